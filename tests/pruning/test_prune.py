"""One-shot pruning of whole networks: what it keeps, in which order it goes, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import revnets
from revnets.pruning import METHODS, prune
from revnets.pruning import one_shot as one_shot_module
from revnets.pruning.calibration import Passes
from revnets.pruning.choice import blocks, global_zeros
from revnets.pruning.inputs import Moments, as_matrices
from revnets.pruning.solve import error, solve

NETWORKS = {"test_revbifpn": 64, "test_resnet": 64, "test_efficientnet": 64, "test_vit": 160, "test_convnext": 64}


def images(size: int = 16, count: int = 12, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


def same_state(one: nn.Module, other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_loads_back_into_plain_timm(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    before, x = copy.deepcopy(model.state_dict()), images(NETWORKS[name], 8)
    model.train()
    model.get_classifier().eval()
    report = prune(model, x, sparsity=0.6, max_passes=3)
    assert same_state(model, before)
    for mine, theirs in zip(report.model.modules(), model.modules(), strict=True):
        assert mine.training == theirs.training
        assert type(mine) is type(theirs)
        assert not mine._forward_hooks
        assert not mine._forward_pre_hooks
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    assert len(report.layers) + len(report.skipped) == sum(
        isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()
    )
    for layer in report.layers:
        weight: Any = report.model.get_submodule(layer.name).weight
        assert int((weight == 0).sum()) == layer.zeros
        assert 0 < layer.error < 1
    assert report.sparse_flops < report.dense_flops
    plain = timm.create_model(name, num_classes=5)
    plain.load_state_dict(report.model.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), report.model.eval()(x))


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_are_identical_and_counts_exact(method: str) -> None:
    model, x = small(), images()
    one, two = (prune(model, x.split(5), sparsity=0.7, method=method) for _ in range(2))
    assert same_state(one.model, two.model.state_dict())
    assert [layer.name for layer in one.layers] == ["3", "5", "8"]
    total = sum(layer.weights for layer in one.layers)
    assert sum(layer.zeros for layer in one.layers) == total - round(0.3 * total)
    assert [(layer.error, layer.zeros) for layer in one.layers] == [(layer.error, layer.zeros) for layer in two.layers]


def test_every_block_reads_what_the_pruned_ones_before_it_give() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double(), torch.randn(64, 8).double()
    report = prune(model, x, sparsity=0.5, exclude=())
    read = x
    for index in (0, 2):
        layer: Any = model[index]
        moments = Moments(layer)
        moments.add(read)
        weight = as_matrices(layer)
        found = solve(weight, moments.hessian(), 32).weight
        torch.testing.assert_close(report.model[index].weight, found[0])
        assert report.layers[index // 2].error == pytest.approx(error(weight, found, moments.hessian()))
        read = report.model[: index + 2](read).detach()


def test_sparsegpt_is_nearer_to_the_network_than_magnitude() -> None:
    model, x = small().eval(), images(count=64)
    errors = {}
    for method in METHODS:
        report = prune(model, x, sparsity=0.7, method=method, recalibrate=False)
        with torch.no_grad():
            errors[method] = float((model(x) - report.model.eval()(x)).square().mean())
    assert errors["sparsegpt"] < errors["wanda"]
    assert errors["sparsegpt"] < errors["magnitude"]


def test_blocks_are_residual_blocks_and_few() -> None:
    def of(model: nn.Module, most: int) -> list[list[str]]:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        return blocks(model, layers, most)

    resnet = of(timm.create_model("resnet18"), 64)
    assert resnet[1] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert len(resnet) == 10
    vit = of(timm.create_model("test_vit"), 64)
    assert vit[1] == [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    few = of(timm.create_model("test_revbifpn"), 7)
    assert len(few) == 7
    assert sum(map(len, few)) == len({name for names in few for name in names}) == 217


def test_steps_keep_the_zeros_of_earlier_ones() -> None:
    model, x = small(), images()
    half = prune(model, x, sparsity=0.5)
    more = prune(half.model, x, sparsity=0.7)
    for layer in half.layers:
        before, after = (r.model.get_submodule(layer.name).weight == 0 for r in (half, more))
        assert after[before].all()
        assert int(after.sum()) == pytest.approx(0.7 * layer.weights, abs=1)
    sparse = revnets.convert(small(), "sparse:0.5", input_size=(3, 16, 16)).model
    report = prune(sparse, x, sparsity=0.7)
    assert not any("Sparse" in type(m).__name__ for m in report.model.modules())
    assert ((report.model[3].weight == 0) >= ~sparse[3].mask).all()


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "global"])
def test_distributions_have_the_same_total(distribution: str) -> None:
    report = prune(small(), images(), sparsity=0.8, method="magnitude", distribution=distribution)
    assert report.sparsity == pytest.approx(0.8, abs=1e-3)
    shares = {round(layer.sparsity, 2) for layer in report.layers}
    assert (len(shares) == 1) == (distribution == "uniform")


def test_global_sparsity_leaves_every_layer_something() -> None:
    weights = {"large": torch.randn(40, 40), "small": 1e-4 * torch.randn(4, 4)}
    zeros = global_zeros(weights, 0.99)
    assert sum(zeros.values()) == 1616 - 16
    assert zeros["small"] < 16


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    sparsity=st.floats(0, 0.999),
    equal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_global_sparsity_never_empties_a_layer(sizes: list[int], sparsity: float, equal: bool, seed: int) -> None:
    """However many layers there are for what may stay, and however small one's weights are."""
    generator = torch.Generator().manual_seed(seed)
    scales = [10.0 ** -(3 * i) for i in range(len(sizes))]
    weights = {
        f"{i}": (torch.ones(n) if equal else scale * torch.randn(n, generator=generator))
        for i, (n, scale) in enumerate(zip(sizes, scales, strict=True))
    }
    zeros = global_zeros(weights, sparsity)
    total = sum(sizes)
    assert all(zeros[f"{i}"] < n for i, n in enumerate(sizes))
    assert sum(zeros.values()) == min(total - round((1 - sparsity) * total), total - len(sizes))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_all_uses_of_a_layer_are_watched(times: int) -> None:
    """A pass ends where the last layer has run for the last time."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.runs = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(times):
                x = self.layer(x)
            self.runs += 1  # not reached: nobody asks for more
            return x

    model, batches = Again(), [torch.randn(5, 4), torch.randn(3, 4), torch.randn(5, 4)]
    moments = Moments(model.layer)
    Passes(model, batches, {"layer": times}).watch({"layer": moments}, lambda share: None)
    expected = Moments(model.layer)
    with torch.no_grad():
        for batch in batches:
            for _ in range(times):
                expected.add(batch)
                batch = model.layer(batch)
    assert moments.rows == times * 13
    torch.testing.assert_close(moments.hessian(), expected.hessian())
    assert model.runs == 0


def test_rules_and_patterns_leave_layers_out() -> None:
    model, x = timm.create_model("test_efficientnet"), images(64, 2)

    def reasons(**options: Any) -> dict[str, str]:
        found = prune(model, x, 0.5, method="magnitude", max_passes=1, recalibrate=False, **options)
        return {s.name: s.reason for s in found.skipped}

    usual = reasons()
    assert usual["conv_stem"] == "the first layer is left out (rule first)"
    assert usual["classifier"] == "the classifier is left out (rule classifier)"
    assert {r.partition("(")[2] for r in usual.values()} == {
        *("rule first)", "rule classifier)", "rule depthwise)", "rule squeeze_excite)")
    }
    assert reasons(exclude=()) == {}
    assert set(reasons(exclude=("blocks.0.*", "first"))) == {"conv_stem", "blocks.0.0.conv"}


def test_tied_weights_and_odd_layers_stay_with_a_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.unused = (nn.Linear(8, 8) for _ in range(4))
            self.b.weight = self.a.weight
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.shared = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.normed(self.shared(self.c(self.b(self.a(self.shared(x))))))

    report = prune(Odd(), torch.randn(32, 8), sparsity=0.5, exclude=())
    reasons = {s.name: s.reason for s in report.skipped}
    assert reasons["a"] == reasons["b"] == "it shares its weight with another layer"
    assert reasons["unused"] == "it is not called in the forward pass"
    assert "Parametrized" in reasons["normed"]
    assert [layer.name for layer in report.layers] == ["shared", "c"]  # one that runs twice reads both inputs


def test_batch_norms_follow_what_pruning_changes() -> None:
    model, x = small(), images(count=32)
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(1, 2)
    report = prune(model, x, sparsity=0.5, exclude=())
    assert report.recalibrated == 1
    (mean, var), (old_mean, old_var) = (moments_of(net[0](x).detach()) for net in (report.model, model))
    torch.testing.assert_close(report.model[1].running_mean, model[1].running_mean + mean - old_mean)
    scale = (var + 1e-5) / (old_var + 1e-5)
    torch.testing.assert_close(report.model[1].running_var, model[1].running_var * scale)
    for name in ("momentum", "num_batches_tracked"):
        assert getattr(report.model[1], name) == getattr(model[1], name)
    nothing = prune(model, x, sparsity=0.0, exclude=())  # so no change
    kept = prune(model, x, sparsity=0.5, exclude=(), recalibrate=False)
    for other in (nothing, kept):
        torch.testing.assert_close(other.model[1].running_mean, model[1].running_mean)
        torch.testing.assert_close(other.model[1].running_var, model[1].running_var)


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1)


BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "empty": (lambda: {"data": []}, "it holds no images"),
    "empty batches": (lambda: {"data": images()[:0]}, "it holds no images"),
    "not finite": (lambda: {"data": [images(), images() / 0]}, "batch 1 holds NaN or infinity"),
    "whole numbers": (lambda: {"data": images().long()}, "torch.int64, expected normalised images"),
    "words": (lambda: {"data": ["image.png"]}, "batch 0 is a str"),
    "two sizes": (lambda: {"data": [images(16), images(20)]}, "shape (3, 20, 20), those before are (3, 16, 16)"),
    "wrong channels": (lambda: {"data": images(channels=4)}, "give images that the model takes"),
    "no images wanted": (lambda: {"images": 0}, "images=0"),
    "no goal": (lambda: {"sparsity": None}, "expected one of the two"),
    "two goals": (lambda: {"pattern": "2:4"}, "expected one of the two"),
    "all gone": (lambda: {"sparsity": 1.0}, "sparsity=1.0"),
    "unknown method": (lambda: {"method": "obd"}, "method='obd': expected one of sparsegpt"),
    "unknown distribution": (lambda: {"distribution": "even"}, "distribution='even'"),
    "pattern and distribution": (
        lambda: {"sparsity": None, "pattern": "2:4", "distribution": "erk"},
        "expected uniform",
    ),
    "blocks without a sparsity": (lambda: {"sparsity": None, "pattern": "4x1"}, "expected a sparsity besides"),
    "unknown pattern": (lambda: {"sparsity": None, "pattern": "4:2"}, "expected N:M"),
    "does not divide": (
        lambda: {"sparsity": None, "pattern": "2:4", "exclude": ()},
        "'2:4': 0, Conv2d(3, 8, kernel_size=(3, 3)), has 3 input channels",
    ),
    "unknown layer": (lambda: {"exclude": ("head.*",)}, "exclude='head.*'"),
    "nothing left": (lambda: {"exclude": ("*",)}, "no layer of the model can be pruned; 0: "),
    "damping": (lambda: {"damping": -1.0}, "damping=-1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case: str) -> None:
    made, words = BAD[case]
    model = small()
    before = copy.deepcopy(model.state_dict())
    options = {"data": images(), "sparsity": 0.5, **made()}
    with pytest.raises(ValueError, match=r".") as raised:
        prune(model, options.pop("data"), **options)
    assert words in str(raised.value), raised.value
    assert len(str(raised.value).splitlines()) == 1
    assert same_state(model, before)
    assert model.training


def test_failure_in_the_middle_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    model[8].weight.data[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the weight of 8 is not finite"):
        prune(model, images(), sparsity=0.5)
    assert torch.equal(model[3].weight, before["3.weight"])
    model[8].weight.data.zero_()
    model[5].weight.data.fill_(1e38)
    with pytest.raises(ValueError, match="the inputs of 8 are not finite"):
        prune(model, images() * 1e3, sparsity=0.5)

    def fails(*_: Any) -> None:
        raise ValueError("nothing works")

    monkeypatch.setattr(one_shot_module, "solve", fails)
    with pytest.raises(ValueError, match=r"^3, Conv2d\(8, 16, kernel_size=\(3, 3\)\): nothing works$"):
        prune(small(), images(), sparsity=0.5)


def test_single_values_per_channel_cannot_be_estimated() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="recalibrate=False"):
        prune(model, [torch.randn(1, 4)], sparsity=0.5, exclude=())


def test_report_as_files(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    report = prune(small(), images(), 0.5, progress=lambda share, name: told.append((share, name)))
    assert told[0] == (0.0, "3")
    assert told[-1] == (1.0, "8")
    assert told == sorted(told)
    paths = report.save(tmp_path / "pruned.safetensors")
    assert [path.name for path in paths] == ["pruned.json", "pruned.csv", "pruned.png"]
    stored = json.loads(paths[0].read_text())
    assert [layer["name"] for layer in stored["layers"]] == ["3", "5", "8"]
    assert stored["sparsity"] == report.sparsity
    assert len(paths[1].read_text().splitlines()) == 4
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert "layers of sparsity 0.5000" in str(report)
    assert report.table().row_count == 3
