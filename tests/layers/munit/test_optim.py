"""Parameter groups of munit-scaled networks: rates follow widths, decay follows neither."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import revnets
from revnets.layers import (
    MuSConv2d,
    MuSLinear,
)

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")


def of(groups: list[dict[str, Any]], parameter: Tensor) -> tuple[float, float]:
    (found,) = [g for g in groups if any(p is parameter for p in g["params"])]
    return found["lr"], found["weight_decay"]


def network() -> nn.Sequential:
    return nn.Sequential(
        MuSConv2d(3, 64, 3, role="input"),
        nn.BatchNorm2d(64),
        MuSConv2d(64, 64, 3, padding=1, groups=64),
        MuSConv2d(64, 256, 1, fp8=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        MuSLinear(256, 10, role="output"),
    )


def test_parameter_groups() -> None:
    net: Any = network()
    groups = revnets.mus_param_groups(net, 0.01, 1e-4, base_width=16)
    assert of(groups, net[3].weight) == (0.005, 0.02)
    for kept in (net[0].weight, net[2].weight, net[6].weight):
        assert of(groups, kept) == (0.01, 0.01)
    for vector in (net[1].weight, net[1].bias, net[3].bias):
        assert of(groups, vector) == (0.01, 0.0)
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    net[3].weight.requires_grad_(False)
    assert len(revnets.mus_param_groups(net, 0.01, 1e-4, base_width=16)) == len(groups) - 1
    one_width = nn.Sequential(MuSLinear(64, 256), MuSLinear(256, 64))
    groups = revnets.mus_param_groups(one_width, 1.0, 0.0, base_width=16, width=64)
    assert {g["lr"] for g in groups} == {0.5, 1.0}


@pytest.mark.parametrize(
    ("layer", "factor"),
    [
        (lambda: MuSLinear(64, 8), 0.5),
        (lambda: MuSLinear(1, 8), 4.0),  # a width like any other
        (lambda: MuSConv2d(1, 8, 3), 4.0),
        (lambda: MuSConv2d(64, 8, 3), 0.5),
        (lambda: MuSConv2d(8, 8, 1, groups=4), 8**0.5),  # grouped, of a width of 2
        (lambda: MuSConv2d(8, 8, 3, groups=8), 1.0),  # depthwise
        (lambda: MuSConv2d(8, 16, 3, groups=8), 1.0),
        (lambda: MuSLinear(64, 8, role="input"), 1.0),
        (lambda: MuSLinear(64, 8, role="output"), 1.0),
    ],
)
def test_rates_follow_the_width_of_a_group(layer: Callable[[], Any], factor: float) -> None:
    made = layer()
    groups = revnets.mus_param_groups(nn.Sequential(made), 0.01, 0.0, base_width=16)
    assert of(groups, made.weight)[0] == pytest.approx(0.01 * factor)
    assert of(groups, made.bias)[0] == 0.01


@pytest.mark.parametrize("name", ["torch", "adamw", "lion"])
def test_weight_decay_does_not_follow_the_learning_rate(name: str) -> None:
    net: Any = network()
    groups = revnets.mus_param_groups(net, 0.01, 1e-3, base_width=4)
    make: Any = torch.optim.AdamW if name == "torch" else lambda g: create_optimizer_v2(g, name, lr=0.01)
    optimizer = make(groups)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, was in zip(net.parameters(), before, strict=True):
        share = 1e-3 if p.dim() > 1 else 0.0
        assert torch.allclose(p, was * (1 - share), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_width": 0}, "base_width=0: expected a number greater than 0"),
        ({"base_width": -64}, "base_width=-64"),
        ({"lr": 0}, "lr=0: expected a number greater than 0"),
        ({"width": 0}, "width=0"),
        ({"weight_decay": 1.5}, "weight_decay=1.5: expected the share of a weight that one step takes off"),
        ({"model": nn.Linear(2, 2)}, "Linear has no munit-scaled layers: convert it first"),
    ],
)
def test_groups_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        revnets.mus_param_groups(**{"model": network(), "lr": 0.01, "weight_decay": 0.0, "base_width": 64, **options})


def test_a_decay_meant_for_adamw_is_noticed() -> None:
    with pytest.warns(UserWarning, match=r"weight_decay=0.05 takes 5% off the weights in every step"):
        revnets.mus_param_groups(network(), 1e-3, 0.05, base_width=64)
