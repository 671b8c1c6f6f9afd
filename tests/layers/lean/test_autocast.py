"""Operators of ours under autocast: the same numbers whether or not somebody watches what is computed."""

from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch

import revnets  # noqa: F401  (registers the networks)
from revnets.reversible.draws import Draws


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_watched_operators_compute_in_the_callers_precision(dtype: torch.dtype) -> None:
    def step(context: Any) -> list[Any]:
        torch.manual_seed(0)
        net = timm.create_model("test_revbifpn", num_classes=3)
        x = torch.randn(2, 3, 32, 32)
        with context:
            with torch.autocast("cpu", dtype=dtype):
                y = net(x)
            y.float().square().sum().backward()
        return [y, *(p.grad for p in net.parameters())]

    found, expected = step(Draws([])), step(nullcontext())
    assert found[0].dtype == dtype
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
