"""Specs: their forms, options, composition, and a sentence for each mistake."""

from dataclasses import dataclass

import pytest
from torch import nn

from revnets.layers import LayerConfig, SparseConfig, SparseLinear, convert, list_layers, parse_layers, register_layer
from revnets.layers.registry import _ENTRIES
from revnets.layers.sites import Site


def test_forms_say_the_same() -> None:
    text = parse_layers("sparse_parallel:0.75:norm_only:init_scale")
    assert text == parse_layers({"type": "sparse_parallel", "sparsity": 0.75, "norm_only": True, "init_scale": True})
    assert text == parse_layers(["sparse_parallel:sparsity:0.75:norm_only:true:init_scale:true"])
    assert text != parse_layers("sparse_parallel:0.75:norm_only:false:init_scale")


def test_composition() -> None:
    parts = parse_layers("sparse_doped:0.5 + dense")
    assert [part.entry.name for part in parts] == ["sparse_doped", "dense"]
    assert parts == parse_layers([{"type": "sparse_doped", "sparsity": 0.5}, "dense"])


@pytest.mark.parametrize("name", list_layers())
def test_every_entry_has_a_summary(name: str) -> None:
    assert _ENTRIES[name].summary.endswith(".")
    assert _ENTRIES[name].config.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sparse_dopd:0.5", "unknown layer 'sparse_dopd' .did you mean sparse_doped.*expected one of dense, .*sparse,"),
        ("sparse_doped", "sparse_doped needs sparsity: write sparse_doped:VALUE"),
        ("sparse_doped:1", r"sparse_doped: sparsity=1.0: expected a number from 0 up to, not including, 1"),
        ("sparse_doped:-0.5", "sparse_doped: sparsity=-0.5"),
        ("sparse_doped:much", "sparse_doped: sparsity='much': expected a number"),
        ("sparse_doped:0.5:norm_only", "sparse_doped has no option 'norm_only': expected one of sparsity, depthwise"),
        ("sparse_doped:0.5:sparsity", "option sparsity needs a value"),
        ({"sparsity": 0.5}, "expected a key 'type'"),
        ({"type": "sparse", "sparsity": 0.5, "mask": "erk"}, "sparse has no option 'mask'"),
        ("", "unknown layer ''"),
        ([], "expected a text such as"),
        (0.5, "expected a text such as"),
    ],
)
def test_mistakes(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layers(spec)


def test_a_new_layer_is_one_function() -> None:
    @dataclass(frozen=True)
    class Config(LayerConfig):
        repeats: int = 2

    @register_layer("test_repeated", Config)
    def repeated(site: Site, config: Config) -> nn.Module:
        """The layer several times."""
        return nn.Sequential(*[nn.Linear(site.layer.in_features, site.layer.out_features)] * config.repeats)

    try:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        report = convert(net, "test_repeated:3+sparse:0.5", input_size=(4,))
        assert [(c.name, c.kind) for c in report.converted] == [("0", "test_repeated"), ("0.0", "sparse")]
        first, second, third = report.model[0]
        assert isinstance(first, SparseLinear)
        assert first is second is third  # one module in three places stays one
        with pytest.raises(ValueError, match="not registered yet"):
            register_layer("test_repeated", Config)
    finally:
        _ENTRIES.pop("test_repeated")


def test_options_are_validated_when_made() -> None:
    with pytest.raises(ValueError, match="sparsity=2"):
        SparseConfig(2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": ["sparse"]}, "expected a key 'type'"),
        ({"type": "sparse", "sparsity": 0.5, "depthwise": "no"}, "depthwise='no': expected true or false"),
    ],
)
def test_dictionaries_are_validated(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layers(spec)
