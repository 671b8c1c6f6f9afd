"""Munit-scaled layers: unit variance, what they say of themselves, and mistakes."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.layers import (
    MuSConv2d,
    MuSLinear,
    SparseMuSConv2d,
    SparseMuSLinear,
)

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")


# --- unit variance ---------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def sizes(layer: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """RMS of output, input gradient and weight gradient for unit-variance input and output gradient."""
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    weight: Any = layer.weight
    return {"output": rms(y), "input gradient": rms(x.grad), "weight gradient": rms(weight.grad)}


def assert_unit_scaled(found: dict[str, float]) -> None:
    for what, size in found.items():
        assert 0.5 <= size <= 2, f"RMS of {what}: {size}"


# The scale is one for three products, so all are of unit variance where fan-in, fan-out and the number of rows agree.
KINDS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "linear": (lambda **kw: MuSLinear(256, 256, **kw), (256, 256)),
    "linear of tokens": (lambda **kw: MuSLinear(128, 192, **kw), (2, 70, 128)),
    "1x1": (lambda **kw: MuSConv2d(64, 64, 1, **kw), (1, 64, 8, 8)),
    "1x1 strided": (lambda **kw: MuSConv2d(64, 128, 1, 2, **kw), (1, 64, 14, 14)),
    "3x3": (lambda **kw: MuSConv2d(16, 16, 3, padding=1, **kw), (1, 16, 12, 12)),
    "depthwise": (lambda **kw: MuSConv2d(256, 256, 5, padding=2, groups=256, **kw), (1, 256, 6, 6)),
    "grouped": (lambda **kw: MuSConv2d(64, 64, 3, padding=1, groups=4, **kw), (1, 64, 12, 12)),
}


@pytest.mark.parametrize("fp8", [False, True], ids=["mus", "mus_fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_unit_variance(kind: str, fp8: bool) -> None:
    torch.manual_seed(1)
    make, shape = KINDS[kind]
    layer = make(fp8=fp8, bias=False)
    weight: Any = layer.weight
    assert rms(weight) == pytest.approx(1, abs=0.05)
    found = sizes(layer, shape)
    if "strided" in kind:  # only every fourth pixel has a gradient
        found["input gradient"] *= 2
    assert_unit_scaled(found)


@pytest.mark.parametrize(
    ("layer", "shape", "wrong"),
    [
        (nn.Linear(256, 256, bias=False), (256, 256), "weight gradient"),
        (MuSLinear(256, 256, bias=False, role="input"), (256, 256), "output"),
        (MuSLinear(256, 256, bias=False, role="output"), (256, 256), "output"),
        (MuSLinear(256, 1280, bias=False), (256, 256), "input gradient"),  # sqrt(fan-out / fan-in)
        (MuSLinear(256, 256, bias=False), (2048, 256), "weight gradient"),  # sqrt(rows / fan-in)
        (MuSConv2d(16, 16, 3, padding=1, bias=False, fp8=True), (8, 16, 12, 12), "weight gradient"),
    ],
)
def test_the_check_fails_for_other_scales(layer: nn.Module, shape: tuple[int, ...], wrong: str) -> None:
    with pytest.raises(AssertionError, match=f"RMS of {wrong}"):
        assert_unit_scaled({wrong: sizes(layer, shape)[wrong]})


@pytest.mark.parametrize(("fan_in", "fan_out", "rows"), [(64, 512, 128), (512, 64, 1024)])
def test_variance_of_other_shapes(fan_in: int, fan_out: int, rows: int) -> None:
    torch.manual_seed(1)
    found = sizes(MuSLinear(fan_in, fan_out, fp8=True), (rows, fan_in))
    assert found["output"] == pytest.approx(1, rel=0.1)
    assert found["input gradient"] == pytest.approx((fan_out / fan_in) ** 0.5, rel=0.1)
    assert found["weight gradient"] == pytest.approx((rows / fan_in) ** 0.5, rel=0.1)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "1x1"])
def test_unit_variance_under_masks(sparsity: float, conv: bool) -> None:
    torch.manual_seed(1)
    kind: Any = partial(SparseMuSConv2d, kernel_size=1) if conv else SparseMuSLinear
    layer = kind(512, 512, bias=False, sparsity=sparsity, fp8=True)
    found = sizes(layer, (2, 512, 16, 16) if conv else (512, 512))
    assert_unit_scaled(found)
    assert rms(layer.weight[layer.mask]) == pytest.approx(1, abs=0.05)


# --- modules ---------------------------------------------------------------------------------------------------------


def test_layers_say_what_is_active() -> None:
    assert "role=hidden, scale=0.125, fp8=e4m3/e5m2, backend=emulate" in repr(
        MuSLinear(64, 8, fp8=True, backend="emulate")
    )
    assert "role=output, scale=0.01562, fp8=off" in repr(MuSLinear(64, 8, fp8=True, role="output"))
    assert "scale=0.3333, fp8=off" in repr(MuSConv2d(8, 8, 3, groups=8, fp8=True))
    assert isinstance(MuSConv2d(8, 8, 3), nn.Conv2d)
    assert set(MuSLinear(4, 4).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MuSLinear(4, 4, role="first"), ValueError, "role='first': expected one of input, hidden, output"),
        (lambda: MuSLinear(4, 4, grad_scale=0), ValueError, "grad_scale=0: expected a number greater than 0, best a"),
        (lambda: MuSLinear(4, 4, backend="cuda"), ValueError, "backend='cuda': expected one of scaled_mm, emulate"),
        (lambda: MuSLinear(4, 4, fp8=True)(torch.ones(2, 5)), ValueError, r"input of shape \(2, 5\).*expected .*4"),
        (lambda: MuSConv2d(4, 4, 1, fp8=True)(torch.ones(4, 5, 5)), ValueError, r"shape \(4, 5, 5\).*expected \(N, 4,"),
        (lambda: MuSLinear(4, 4)(torch.ones(2, 4).long()), TypeError, "mus_linear: got an input of torch.int64"),
        (lambda: MuSConv2d(4, 4, 1)(torch.ones(1, 4, 2, 2).int()), TypeError, "MuSConv2d: got an input of torch.int32"),
    ],
)
def test_mistakes(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_widths_that_cannot_be_padded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of empty tensors
        with pytest.raises(ValueError, match=r"weight of shape \(4, 0\): expected widths of 1 at least"):
            MuSLinear(0, 4, fp8=True)
