"""What cannot be made reversible says why, and stays as it was; what is left out is in the report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import revnets
from revnets.retrofit import ReversibleStage
from tests.retrofit.networks import NETWORKS, loss, made


def _checkpointed() -> nn.Module:
    model = NETWORKS["vit"][0]()
    model.set_grad_checkpointing()  # type: ignore[operator]
    return model


def _compiled() -> nn.Module:
    return torch.compile(NETWORKS["vit"][0](), backend="eager")  # type: ignore[return-value]


def _compiled_in_place() -> nn.Module:
    model = NETWORKS["vit"][0]()
    model.compile(backend="eager")
    return model


def _twice() -> nn.Module:
    return revnets.reversible(NETWORKS["vit"][0](), input_size=(3, 64, 64))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: timm.create_model("vgg11", num_classes=2), "VGG runs no residual blocks"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), "Sequential runs no residual blocks"),
        (
            lambda: timm.create_model("test_eva", num_classes=2) if "test_eva" in timm.list_models() else _eva(),
            "ModuleList",
        ),
        (lambda: nn.DataParallel(NETWORKS["vit"][0]()), "is wrapped in DataParallel: make it reversible first"),
        (_compiled, "is compiled: make it reversible first"),
        (_compiled_in_place, "is compiled: make it reversible first"),
        (_twice, "has reversible parts already"),
        (lambda: timm.create_model("revbifpn_s0"), "has reversible parts already"),
        (_checkpointed, "call model.set_grad_checkpointing\\(False\\) first"),
        (lambda: 3, "expected a model, got int"),
        (lambda: nn.Linear(4, 4), "Linear does not run on an input of shape"),
    ],
    ids=lambda v: None if callable(v) else v[:24],
)
def test_what_cannot_be_made_reversible(make: Callable[[], Any], said: str) -> None:
    model = make()
    before = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(ValueError, match=said) as caught:
        revnets.reversible(model, input_size=(3, 64, 64))  # type: ignore[operator]
    assert str(caught.value).startswith("reversible: ")
    if isinstance(model, nn.Module):
        assert [type(m) for m in model.modules()] == before


def _eva() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("eva02_tiny_patch14_224", patch_size=16, **sizes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 3}, "bits=3: expected one of 4, 8, 16 with streams=1"),
        ({"bits": True}, "bits=True"),
        ({"bits": 16, "streams": 2}, "bits=16: expected one of 0, 1, 2, 4, 8 with streams=2"),
        ({"streams": 3}, "streams=3: expected 1 or 2"),
        ({"exact": 30}, "exact=30"),
        ({"exact": False, "streams": 2}, "exact=False with streams=2 and bits=8 would lose 8 bits"),
        ({"mode": "rewind"}, "unknown mode 'rewind'"),
        ({"input_size": (1, 64, 64)}, "does not run on an input of shape .* give the right input_size"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    model = NETWORKS["vit"][0]()
    with pytest.raises(ValueError, match=said):
        revnets.reversible(model, **{"input_size": (3, 64, 64), **options})  # type: ignore[operator]
    assert not any(isinstance(m, ReversibleStage) for m in model.modules())


def test_the_report_names_blocks() -> None:
    model = revnets.reversible(timm.create_model("resnet26"))  # type: ignore[operator]
    said = str(model.retrofit)
    assert "layer1.0: computed again from its input (changes the shape 64x56x56 to 256x56x56)" in said
    assert "layer4.1: reversible" in said
    cait = timm.create_model("cait_xxs24_224", depth=2, embed_dim=16, num_heads=2)
    said = str(revnets.reversible(cait).retrofit)  # type: ignore[operator]
    assert said.splitlines() == [
        "blocks.0 to blocks.1: reversible (2 blocks)",
        "blocks_token_only: as it was, a ModuleList, whose blocks the network calls one by one",
    ]


class _Odd(nn.Module):
    """A block of whatever kind."""

    def __init__(self, how: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.how = how

    def forward(self, x: Any) -> Any:
        return self.how(x, self.layer)


@pytest.mark.parametrize(
    "how",
    [
        lambda x, layer: layer(x),
        lambda x, layer: x.add_(layer(x)),
        lambda x, layer: layer(x) * x,
        lambda x, layer: torch.cat([x, layer(x)], 1)[:, :4].sigmoid(),
    ],
    ids=["no residual", "in place", "a gate", "not handed on as it is"],
)
def test_blocks_that_are_no_residual_ones_are_left(how: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(ValueError, match="runs no residual blocks that keep their shape"):
        revnets.reversible(nn.Sequential(_Odd(how), _Odd(how)), input_size=(4,))  # type: ignore[operator]


def test_a_stage_that_was_changed_runs_as_it_is() -> None:
    model, x = made("vit")
    revnets.reversible(model, input_size=(3, 64, 64))  # type: ignore[operator]
    expected = copy.deepcopy(model)
    expected.blocks = nn.Sequential(*expected.blocks[:2])
    del model.blocks[2:]
    assert torch.equal(model(x), expected(x))
    loss(model(x)).backward()
    assert type(model.blocks[:1]) is nn.Sequential


def test_replicas_of_data_parallel_are_refused() -> None:
    model, x = made("vit")
    revnets.reversible(model, input_size=(3, 64, 64))  # type: ignore[operator]
    model.blocks._is_replica = True
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        model(x)


def test_intermediate_features_are_the_networks_own() -> None:
    model, x = made("vit")
    expected = model.eval().forward_intermediates(x, intermediates_only=True)
    revnets.reversible(model, input_size=(3, 64, 64))  # type: ignore[operator]
    found = model.train().forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
