"""The optimizer constructor for munit-scaled networks, built as MMEngine builds it from a config."""

from typing import Any

import pytest
from torch import nn

from revnets.layers import MuSLinear

pytest.importorskip("mmengine")
pytest.importorskip("mmdet")

import revnets.mm  # noqa: F401 - registers the constructor


def wrapper(model: nn.Module, **paramwise: Any) -> Any:
    from mmengine.optim import build_optim_wrapper

    optimizer = {"type": "AdamW", "lr": 0.5, "weight_decay": 1e-4}
    cfg = {"type": "OptimWrapper", "constructor": "MuSOptimWrapperConstructor", "optimizer": optimizer}
    return build_optim_wrapper(model, {**cfg, "paramwise_cfg": paramwise})


def test_groups_from_a_config() -> None:
    model = nn.Sequential(MuSLinear(256, 256, bias=False), nn.LayerNorm(256))
    groups = wrapper(model, base_width=64).optimizer.param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [(0.25, 4e-4, 1), (0.5, 0.0, 2)]
    groups = wrapper(model, base_width=64, width=64).optimizer.param_groups
    assert {g["lr"] for g in groups} == {0.5}


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        ({}, r"paramwise_cfg=\{\}: expected base_width"),
        ({"base_width": 64, "norm_decay_mult": 0.0}, "expected base_width, the width at which"),
        ({"base_width": 0}, "base_width=0: expected a number greater than 0"),
    ],
)
def test_mistakes(paramwise: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapper(nn.Sequential(MuSLinear(4, 4)), **paramwise)
