"""Munit-scaled functions: values and gradients are those of the quantised function, and little is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnets.layers import (
    MuSConv2d,
    MuSLinear,
    fp8_products,
    mus_conv2d,
    mus_linear,
    quantize,
)
from revnets.layers.munit.fp8 import E4M3, E5M2
from revnets.layers.munit.functional import GRAD_SCALE
from tests.helpers import assert_same_step, training_step

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")


Function = Callable[..., Tensor]
CASES: dict[str, tuple[Function, Function, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (mus_linear, F.linear, (3, 7, 40), (24, 40)),
    "1x1": (mus_conv2d, F.conv2d, (2, 24, 5, 6), (16, 24, 1, 1)),
    "1x1 strided": (
        lambda *a, **kw: mus_conv2d(*a, stride=2, **kw),
        lambda *a: F.conv2d(*a, stride=2),
        (2, 24, 7, 6),
        (16, 24, 1, 1),
    ),
    "3x3": (
        lambda *a, **kw: mus_conv2d(*a, 2, 1, **kw),
        lambda *a: F.conv2d(*a, stride=2, padding=1),
        (2, 8, 9, 8),
        (12, 8, 3, 3),
    ),
    "1x1, unequal strides": (
        lambda *a, **kw: mus_conv2d(*a, stride=(2, 3), **kw),
        lambda *a: F.conv2d(*a, stride=(2, 3)),
        (2, 24, 7, 8),
        (16, 24, 1, 1),
    ),
    "3x2, unequal strides and padding": (
        lambda *a, **kw: mus_conv2d(*a, (1, 2), (0, 1), (2, 1), **kw),
        lambda *a: F.conv2d(*a, stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
        (2, 8, 9, 7),
        (12, 8, 3, 2),
    ),
    "1x1 padded, dilated": (
        lambda *a, **kw: mus_conv2d(*a, 1, (1, 0), 2, **kw),
        lambda *a: F.conv2d(*a, padding=(1, 0), dilation=2),
        (2, 8, 5, 5),
        (12, 8, 1, 1),
    ),
}


def of_quantized(
    function: Function, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, scale: float
) -> list[Tensor]:
    """Value and gradients in float64 of the function of quantised operands, for the quantised gradient."""
    x, weight = (quantize(t.detach(), E4M3).double().requires_grad_() for t in (x, weight))
    y = function(x, weight) * scale
    grads = torch.autograd.grad(y, (x, weight), quantize(grad, E5M2, GRAD_SCALE).double() / GRAD_SCALE)
    bias = bias.double() if y.dim() != 4 else bias.double()[:, None, None]
    return [y + bias, *grads]


def made(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    _, plain, *shapes = CASES[case]
    x, weight = (torch.randn(shape, dtype=dtype).mul_(2).requires_grad_() for shape in shapes)
    bias = torch.randn(shapes[1][0], dtype=dtype, requires_grad=True)
    return x, weight, bias, torch.randn_like(plain(x, weight))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["emulate", "scaled_mm"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_quantised_function(case: str, backend: str, channels_last: bool) -> None:
    x, weight, bias, grad = made(case)
    given = x
    if x.dim() == 4 and channels_last:
        given = x.contiguous(memory_format=torch.channels_last)
    y = CASES[case][0](given, weight, bias, scale=0.21, fp8=True, backend=backend)
    grads = torch.autograd.grad(y, (x, weight, bias), grad)
    expected = of_quantized(CASES[case][1], x, weight, bias, grad, 0.21)
    for got, exact in zip((y, *grads[:2]), expected, strict=True):
        assert got.shape == exact.shape
        assert (got.double() - exact).norm() < 1e-6 * exact.norm()
    dims = tuple(range(y.dim() - 1)) if y.dim() != 4 else (0, 2, 3)
    assert torch.allclose(grads[2], grad.sum(dims), rtol=1e-5, atol=1e-5)  # never quantised
    if y.dim() == 4:
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("case", CASES)
def test_float64_is_exact(case: str) -> None:
    x, weight, bias, grad = made(case, torch.float64)
    y = CASES[case][0](x, weight, bias, scale=0.21, fp8=True, backend="scaled_mm")
    got = (y, *torch.autograd.grad(y, (x, weight), grad))
    for a, b in zip(got, of_quantized(CASES[case][1], x, weight, bias, grad, 0.21), strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_without_fp8_it_is_the_scaled_function(case: str) -> None:
    x, weight, bias, grad = made(case, torch.float64)
    mine, plain, *_ = CASES[case]
    y, z = mine(x, weight, bias, scale=0.21), plain(x, weight) * 0.21
    z = z + (bias if z.dim() != 4 else bias[:, None, None])
    wanted = (x, weight, bias)
    pairs = zip((y, *torch.autograd.grad(y, wanted, grad)), (z, *torch.autograd.grad(z, wanted, grad)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("case", ["linear", "1x1", "3x3"])
def test_autocast(case: str, fp8: bool) -> None:
    x, weight, bias, grad = made(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = CASES[case][0](x, weight, bias, scale=0.21, fp8=fp8, backend="emulate")
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, (x, weight, bias), grad.bfloat16())
    assert [g.dtype for g in grads] == [torch.float32] * 3
    if fp8:  # quantised from float32 at once, and the gradients are not rounded to bfloat16
        exact = of_quantized(CASES[case][1], x, weight, bias, grad.bfloat16(), 0.21)
        assert (y.double() - exact[0]).norm() < 4e-3 * exact[0].norm()
        assert all((a.double() - b).norm() < 1e-6 * b.norm() for a, b in zip(grads, exact[1:], strict=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_mean_losses_are_not_flushed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(32, 64, dtype=dtype), torch.randn(48, 64), torch.randn(32, 48, dtype=dtype)
    for shift, grad_scale, good in ((0, 1.0, True), (0, GRAD_SCALE, True), (-20, 1.0, False), (-20, GRAD_SCALE, True)):
        small = (grad.float() * 2.0**shift).to(dtype)
        leaf = weight.clone().requires_grad_()
        mus_linear(x, leaf, scale=1.0, fp8=True, backend="emulate", grad_scale=grad_scale).backward(small)
        exact = small.double().t() @ x.double()
        assert leaf.grad is not None
        error = (leaf.grad.double() - exact).norm() / exact.norm()
        assert error < 0.1 if good else error > 0.9, (shift, grad_scale, error)


@pytest.mark.parametrize("case", ["linear", "1x1", "3x3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_a_loss_scaler_gradients_are_scaled_once(case: str, dtype: torch.dtype) -> None:
    x, weight, _, grad = made(case)
    x, large = x.detach().to(dtype), (grad.clamp(-4, 4) * 2.0**13).to(dtype)  # within the range of float16
    found = {}
    for name, options in {"default": {}, "once": {"grad_scale": 1.0}, "twice": {"grad_scale": GRAD_SCALE}}.items():
        y = CASES[case][0](x, weight, None, scale=1.0, fp8=True, backend="emulate", **options)
        (found[name],) = torch.autograd.grad(y, weight, large)
    same = {torch.float16: "once", torch.bfloat16: "twice"}[dtype]
    assert torch.equal(found["default"], found[same])
    assert found["twice"].norm() < 0.05 * found["once"].norm()  # clipped


@pytest.mark.parametrize("case", ["linear", "1x1", "3x3"])
def test_a_byte_per_number_is_kept(case: str) -> None:
    x, weight, *_ = made(case)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        CASES[case][0](x, weight, None, scale=1.0, fp8=True, backend="emulate")
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel() + weight.numel()


@pytest.mark.parametrize("case", ["linear", "1x1"])
def test_nothing_is_kept_without_gradients(case: str) -> None:
    x, weight, bias, _ = made(case)
    options: dict[str, Any] = {"scale": 0.21, "fp8": True, "backend": "scaled_mm"}
    kept: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = CASES[case][0](x, weight, bias, **options)
    assert not kept
    assert torch.equal(y, CASES[case][0](x, weight, bias, **options))


def test_only_what_is_needed_and_second_derivatives() -> None:
    x, weight, bias, _ = made("linear")
    fp8_products(reset=True)
    mus_linear(x.detach(), weight, fp8=True, scale=1.0, backend="emulate").sum().backward()
    assert fp8_products() == {"emulate": 2}
    y = mus_linear(x, weight, bias, fp8=True, scale=1.0, backend="emulate").square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "kernel_size": 3},
        {"padding": "same", "kernel_size": 4},
        {"padding": 1, "kernel_size": 3, "padding_mode": "reflect"},
        {"padding": (1, 0), "kernel_size": (3, 1), "padding_mode": "circular"},
        {"padding": "valid", "kernel_size": 1},
    ],
)
def test_padding_as_torch_pads(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = MuSConv2d(4, 6, **options, fp8=True, backend="emulate")
    plain = nn.Conv2d(4, 6, **options)
    plain.load_state_dict({"weight": quantize(layer.weight, E4M3).float() * layer.scale, "bias": layer.bias})
    x = quantize(torch.randn(2, 4, 7, 8), E4M3).float()
    assert torch.allclose(layer(x), plain(x), atol=1e-5)


def test_compiled_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        MuSConv2d(3, 16, 3, role="input"), MuSConv2d(16, 16, 1, fp8=True), nn.Flatten(2), MuSLinear(36, 8, fp8=True)
    )
    x = torch.randn(2, 3, 8, 8)
    expected = training_step(net, (x,), lambda y: y.square().mean())
    got = training_step(torch.compile(net, backend="aot_eager"), (x,), lambda y: y.square().mean())
    got.grads = {name.removeprefix("_orig_mod."): grad for name, grad in got.grads.items()}
    assert_same_step(got, expected, 1e-5)
