"""Munit-scaled layers: unit variance, gradients of the quantised function, conversion and back, reversible nets."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import revnets
from revnets.layers import (
    MuSConv2d,
    MuSLinear,
    SparseMuSConv2d,
    SparseMuSLinear,
    fp8_products,
    mus_conv2d,
    mus_linear,
    quantize,
)
from revnets.layers.munit.fp8 import E4M3, E5M2
from revnets.layers.munit.functional import GRAD_SCALE
from tests.helpers import assert_same_step, training_step

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


# --- numbers ---------------------------------------------------------------------------------------------------------

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


# --- parameter groups ------------------------------------------------------------------------------------------------


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
