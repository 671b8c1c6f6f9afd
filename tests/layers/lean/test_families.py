"""``lean`` over timm: every family's smallest network converts, or says why not, and trains as it did."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets  # noqa: F401 - its own networks are among timm's
from revnets.layers import convert, is_lean
from revnets.profiling.memory import tensors_of
from tests.helpers import StepResult, assert_same_step, training_step

TINY = [name for name in timm.list_models("test_*") if "revbifpn" not in name]
LARGEST = 60e6
"""Parameters of the largest network that is run, rather than converted on the meta device."""


def smallest(module: str) -> str:
    """The network of a module of timm with the fewest parameters."""
    sizes = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(sizes, key=lambda name: sizes[name])


def loss(outputs: Any) -> Tensor:
    return torch.stack([y.float().square().mean() for y in tensors_of(outputs)]).sum()


def step(model: nn.Module, x: Tensor) -> StepResult:
    return training_step(model.train(), (x,), loss)


def check(name: str) -> str:
    """Convert and, unless it is huge, compare a step; what came of it, in words."""
    torch.manual_seed(0)
    with torch.device("meta"):
        sketch = timm.create_model(name)
    size = sketch.pretrained_cfg["input_size"]
    if sum(p.numel() for p in sketch.parameters()) > LARGEST:
        report = convert(sketch, "lean")
        return f"not run, {report.converted[0].note if report.converted else report.skipped[0].reason}"
    plain = timm.create_model(name).train()
    lean = copy.deepcopy(plain)
    try:
        report = convert(lean, "lean")
    except ValueError as error:
        return f"refused: {error}"
    assert bool(report.converted) == is_lean(lean)
    assert report.converted or report.skipped
    if not report.converted:
        return f"stays: {report.skipped[0].reason}"
    x = torch.randn(2, *size)
    expected = step(plain, x)
    try:
        assert_same_step(step(lean, x), expected, 0)
    except AssertionError:  # kernels of several threads, or another order of sums
        assert_same_step(step(copy.deepcopy(lean), x), step(plain, x), 1e-3)
        return f"close, {report.converted[0].note}"
    return f"equal, {report.converted[0].note}"


@pytest.mark.parametrize("name", [n if n == "test_vit2" else pytest.param(n, marks=pytest.mark.slow) for n in TINY])
def test_small_networks(name: str) -> None:
    found = check(name)
    print(f"\n{name}: {found}")
    assert found.startswith(("equal", "close"))


@pytest.mark.slow
@pytest.mark.parametrize("module", timm.list_modules())
def test_every_family(module: str, record_property: Any) -> None:
    name = smallest(module)
    found = check(name)
    record_property("lean", found)
    print(f"\n{module}: {name}: {found}")
