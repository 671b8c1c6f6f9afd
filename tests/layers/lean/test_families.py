"""``lean`` over timm: every family's smallest network converts, or says why not, and trains as it did."""

import copy
import os
import re
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
"""Parameters of the largest network that is run on two images; larger ones run on one."""


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


def too_large(sketch: nn.Module, weights: int) -> str:
    """Why a step is not run, converted without memory only: two networks, gradients of both, what one step keeps."""
    report = convert(sketch, "lean")
    note = report.converted[0].note if report.converted else report.skipped[0].reason
    kept = re.search(r"plain ([\d.]+)", note)
    needed = 5 * weights + 1.2e6 * float(kept[1] if kept else 0)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"not run, it needs {needed / 1e9:.1f} GB of {free / 1e9:.1f}, {note}" if needed > free else ""


def check(name: str) -> str:
    """Convert and, unless it is huge, compare a step; what came of it, in words."""
    torch.manual_seed(0)
    with torch.device("meta"):
        sketch = timm.create_model(name)
    size = sketch.pretrained_cfg["input_size"]
    parameters = sum(p.numel() for p in sketch.parameters())
    batch_size = 2 if parameters <= LARGEST else 1
    if parameters > LARGEST and (why := too_large(sketch, 4 * parameters)):
        return why
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
    x = torch.randn(batch_size, *size)
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
