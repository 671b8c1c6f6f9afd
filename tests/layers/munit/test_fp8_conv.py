"""FP8 convolutions in Triton: in its interpreter against float64 of the quantised operands, and who decides.

What needs the interpreter, which is a setting of a whole process, runs in one of its own: ``in_interpreter``.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.layers import MuSConv2d, mus_conv2d, quantize
from revnets.layers.munit import fp8, fp8_conv
from revnets.layers.munit.fp8 import E4M3, E5M2, fp8_products
from revnets.layers.munit.fp8_conv import Choice, can_convolve, choose, padded_words
from revnets.layers.munit.fp8_conv_ops import (
    conv_input_gradient,
    conv_output,
    conv_weight_gradient,
    fp8_maps,
    three_products,
    wrong,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SCALE, GRAD_SCALE = 0.37, 2.0**6
BF16, FP16 = torch.bfloat16, torch.float16


def in_interpreter(*names: str) -> None:
    calls = "; ".join(f"t.{name}" for name in names)
    code = f"import warnings; warnings.simplefilter('ignore'); import tests.layers.munit.test_fp8_conv as t; {calls}"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert result.returncode == 0, result.stderr[-3000:]


# --- the three products ----------------------------------------------------------------------------------------------


def cases(most: int) -> st.SearchStrategy[dict[str, Any]]:
    """Convolutions of kernels up to so many taps in each direction."""
    return st.fixed_dictionaries(
        {
            "sizes": st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 12), st.integers(1, 12)),
            "outputs": st.integers(1, 70),
            "kernel": st.tuples(st.integers(1, most), st.integers(1, most)),
            "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
            "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
            "dilation": st.tuples(st.integers(1, 3), st.integers(1, 3)),
            "dtype": st.sampled_from([torch.float32, torch.float32, BF16, FP16]),
            "last": st.booleans(),
            "last_weight": st.booleans(),
        }
    )


def operands(case: dict[str, Any]) -> tuple[Tensor, Tensor, list[list[int]]]:
    torch.manual_seed(0)
    (n, c, h, w), outputs = case["sizes"], case["outputs"]
    geometry = [list(case.get(name, one)) for name, one in (("stride", (1, 1)), ("padding", (0, 0)))]
    geometry.append(list(case.get("dilation", (1, 1))))
    made = []
    for shape, last in (
        ((n, c, h, w), case.get("last", True)),
        ((outputs, c, *case["kernel"]), case.get("last_weight")),
    ):
        t = (2 * torch.randn(shape)).to(case.get("dtype", torch.float32))
        made.append(t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))
    return made[0].requires_grad_(), made[1].requires_grad_(), geometry


def products(
    x: Tensor, weight: Tensor, geometry: Any, backend: str, grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, gradients of the operands, and the gradient of the output that they are of."""
    y = mus_conv2d(
        *(x, weight, None, *geometry),
        scale=SCALE,
        fp8=True,
        backend=backend,
        grad_scale=GRAD_SCALE,
        pointwise="triton",
    )
    grad = torch.randn_like(y) if grad is None else grad
    return y, *torch.autograd.grad(y, (x, weight), grad), grad


def exact(x: Tensor, weight: Tensor, geometry: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """In float64, of the quantised operands."""
    leaves = [quantize(t.detach(), E4M3).double().requires_grad_() for t in (x, weight)]
    y = F.conv2d(*leaves, None, *geometry) * SCALE
    return y, *torch.autograd.grad(y, leaves, quantize(grad, E5M2, GRAD_SCALE).double() / GRAD_SCALE)


def off(a: Tensor, b: Tensor) -> float:
    return ((a.detach().double() - b.detach()).norm() / b.detach().double().norm().clamp_min(1e-30)).item()


def check(case: dict[str, Any], bound: float = 1e-5) -> None:
    """All three products: the sums themselves, in float32 whatever the operands are, and what is rounded of them."""
    x, weight, geometry = operands(case)
    fp8_products(reset=True)
    *got, grad = products(x, weight, geometry, "scaled_mm")
    count = fp8_products(reset=True)
    assert sum(n for name, n in count.items() if name.startswith("triton")) == 3, count
    *emulated, _ = products(x, weight, geometry, "emulate", grad)
    wide = got
    if x.dtype != torch.float32:
        wide = [*three_products(x.detach(), weight.detach(), grad, geometry, SCALE, GRAD_SCALE)]
    for name, a, w, b, c in zip(("y", "dx", "dw"), got, wide, exact(x, weight, geometry, grad), emulated, strict=True):
        assert w.dtype == torch.float32
        assert off(w, b) < bound, (name, case, off(w, b))
        assert a.dtype == c.dtype == x.dtype, (name, case)
        assert a.shape == c.shape, (name, case)
        assert torch.equal(a, w.to(a.dtype)), (name, case)  # one rounding, that of the result's type
        assert off(a, c.double()) < (bound if a.dtype == torch.float32 else 1e-3), (name, case, off(a, c))


def shapes(count: int, most: int = 3) -> None:
    suppressed = [HealthCheck.too_slow, HealthCheck.filter_too_much]

    @settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=suppressed)
    @given(case=cases(most))
    def any_shape(case: dict[str, Any]) -> None:
        sizes = zip(case["sizes"][2:], *(case[n] for n in ("kernel", "padding", "dilation")), strict=True)
        assume(all(n + 2 * p - d * (k - 1) >= 1 for n, k, p, d in sizes))
        seen.append(str(case))
        check(case)

    seen: list[str] = []
    any_shape()
    assert len(set(seen)) >= count, len(set(seen))


def chosen_shapes() -> None:
    """Several blocks of channels; tiles of outputs; strides that leave pixels without a tap; one pixel; one channel."""
    check({"sizes": (1, 150, 4, 5), "outputs": 20, "kernel": (3, 3), "padding": (1, 1)})
    check({"sizes": (2, 20, 5, 5), "outputs": 140, "kernel": (2, 1), "last": False})
    check({"sizes": (1, 8, 9, 9), "outputs": 8, "kernel": (2, 2), "stride": (5, 4)})
    check({"sizes": (1, 8, 9, 10), "outputs": 8, "kernel": (3, 3), "stride": (2, 3), "dilation": (3, 2)})
    check({"sizes": (1, 1, 1, 1), "outputs": 1, "kernel": (1, 1)})
    check({"sizes": (2, 16, 3, 20), "outputs": 16, "kernel": (1, 3), "padding": (0, 5)})


def hard_numbers() -> None:
    """Clipped where out of range, NaN where NaN is; to the bit what ``quantize`` gives, zeros behind the channels."""
    from revnets.layers.munit.fp8_conv_triton import cast

    values = torch.tensor([1e9, -1e9, torch.inf, -torch.inf, torch.nan, 1e-9, -0.0, 2.0**-9, 3 * 2.0**-11])
    for dtype, scale in ((E4M3, 1.0), (E5M2, 2.0**14)):
        for kind in (torch.float32, BF16, FP16):
            x = torch.cat([values, torch.randn(2 * 5 * 3 * 4 - len(values)) * 8]).view(2, 5, 3, 4).to(kind)
            wide = x[:, :, :, None].expand(2, 5, 3, 7, 4)[:, :, :, 2]  # strided, not contiguous
            for t in (x, x.contiguous(memory_format=torch.channels_last), wide, x.transpose(0, 1), x[:, 1:, ::2]):
                got = cast(t, dtype, scale)
                wanted = quantize(t, dtype, scale).permute(0, 2, 3, 1).contiguous()
                channels = t.shape[1]
                nan = wanted.float().isnan()
                assert torch.equal(got[..., :channels].float().isnan(), nan)
                same = got[..., :channels].contiguous().view(torch.uint8) == wanted.view(torch.uint8)
                assert (same | nan).all(), (dtype, kind)
                assert not got[..., channels:].contiguous().view(torch.uint8).any()
    x, weight, geometry = operands({"sizes": (1, 4, 6, 6), "outputs": 4, "kernel": (3, 3)})
    with torch.no_grad():
        x[0, 0, 0, 0], x[0, 1, 5, 5] = torch.nan, 1e9
    y, *_ = products(x, weight, geometry, "scaled_mm")
    emulated, *_ = products(x, weight, geometry, "emulate")
    assert torch.equal(y.isnan(), emulated.isnan())
    assert y.isnan().any()
    assert not y.isnan().all()
    assert torch.allclose(y, emulated, rtol=1e-5, atol=1e-4, equal_nan=True)


def every_tile_and_again() -> None:
    """No tile changes a number, nor does a second run, nor a workspace for one image at a time."""
    from revnets.layers.munit import fp8_conv_triton

    case = {"sizes": (3, 40, 5, 6), "outputs": 72, "kernel": (2, 1), "padding": (1, 0), "stride": (1, 2)}
    x, weight, geometry = operands(case)
    *first, grad = products(x, weight, geometry, "scaled_mm")
    tiles = fp8_conv_triton.TILES
    for tile in (*tiles, tiles[0]):
        fp8_conv_triton.TILES = (tile,)
        again = products(x, weight, geometry, "scaled_mm", grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again[:3], strict=True)), tile
    fp8_conv_triton.WORKSPACE = 1
    check(case)
    fp8_conv_triton._PROGRAMS = 10**6
    check({"sizes": (2, 3, 40, 32), "outputs": 4, "kernel": (1, 2)})  # so that there are parts


def compiled_and_autocast() -> None:
    """``torch.compile`` sees operators whole, with the right shapes; autocast gives the type of the result alone."""
    torch.manual_seed(0)
    layer = MuSConv2d(8, 24, 3, 2, 1, fp8=True, backend="scaled_mm")
    emulated = MuSConv2d(8, 24, 3, 2, 1, fp8=True, backend="emulate")
    emulated.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 7, 6, requires_grad=True)
    y = layer(x)
    grads = torch.autograd.grad(y.square().sum(), (x, layer.weight))
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    z = compiled(x)
    assert torch.equal(y, z)
    assert all(
        torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(z.square().sum(), (x, layer.weight)), strict=True)
    )
    with torch.autocast("cpu", dtype=BF16):
        low, expected = layer(x), emulated(x)
    assert low.dtype == expected.dtype == BF16
    assert off(low, expected) < 1e-3
    grad = torch.randn_like(low)
    pairs = zip(
        torch.autograd.grad(low, (x, layer.weight), grad),
        torch.autograd.grad(expected, (x, emulated.weight), grad),
        strict=True,
    )
    for a, b in pairs:
        assert a.dtype == torch.float32
        assert off(a, b) < 1e-5
    maps, taps = fp8_maps(x.detach(), E4M3, 1.0), fp8_maps(layer.weight.detach(), E4M3, 1.0)
    back = fp8_maps(layer.weight.detach().transpose(0, 1), E4M3, 1.0)
    grads8, flat, kinds = fp8_maps(y.detach(), E5M2, 1.0), [2, 2, 1, 1, 1, 1], (BF16, True)
    for op, arguments in (
        (fp8_maps, (x.detach().bfloat16(), E4M3, 2.0)),
        (conv_output, (maps, taps, flat, 0.5, *kinds)),
        (conv_input_gradient, (grads8, back, flat, 0.5, [2, 8, 7, 6], *kinds)),
        (conv_weight_gradient, (grads8, maps, flat, 0.5, [24, 8, 3, 3], *kinds)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_faketensor",))


def kept_and_counted() -> None:
    """A byte a number is kept, without gradients nothing; only the products that are needed are made."""
    x, weight, geometry = operands({"sizes": (1, 16, 5, 5), "outputs": 32, "kernel": (3, 3)})
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        fp8_conv.fp8_conv2d(x, weight, 1.0, 1.0, torch.float32, geometry)
        assert sum(t.numel() * t.element_size() for t in kept) == x.numel() + weight.numel()
        kept.clear()
        with torch.no_grad():
            fp8_conv.fp8_conv2d(x, weight, 1.0, 1.0, torch.float32, geometry)
        assert not kept
    fp8_products(reset=True)
    layer = MuSConv2d(16, 32, 3, fp8=True, backend="scaled_mm")
    layer(x.detach()).sum().backward()
    assert fp8_products(reset=True) == {"triton": 2}
    assert layer.note.endswith("e4m3/e5m2, on FP8 units, by the Triton kernel")
    MuSConv2d(16, 20, 3, fp8=True, backend="scaled_mm")(x.detach()).sum().backward()
    assert fp8_products(reset=True) == {"triton, padded": 2}
    for empty in (x.detach()[:0], x.detach()):
        MuSConv2d(16, 16, 1 if len(empty) else 3, fp8=True, backend="scaled_mm")(empty)
    assert fp8_products(reset=True) == {"emulate, convolution": 1, "scaled_mm": 1}


def same_layouts() -> None:
    """Results have the layout of the input, gradients those of their operands, kernels of one tap included."""
    for kernel in (1, 3):
        for last in (False, True):
            for last_weight in (False, True):
                case = {"sizes": (2, 3, 5, 4), "outputs": 6, "kernel": (kernel, kernel), "last": last}
                x, weight, geometry = operands({**case, "last_weight": last_weight})
                y, grad_x, grad_weight, _ = products(x, weight, geometry, "scaled_mm")
                assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
                assert (grad_x.stride(), grad_weight.stride()) == (x.stride(), weight.stride())


def far_addresses() -> None:
    """A second image that starts 2^31 bytes behind the first; untouched memory of zeros costs nothing."""
    from revnets.layers.munit.fp8_conv_kernels_triton import columns, product

    one, two, height, width, pitch = 0x38, 0x40, 2**15, 2**12, 16
    x = torch.zeros(2**31 + 64, dtype=torch.uint8)
    x[:pitch], x[2**31 : 2**31 + pitch] = two, one
    y, t = torch.empty(2, 1, 1, 1), torch.zeros(1, 1, 2, 8, dtype=torch.uint8)
    weight = torch.full((1, 1, 1, pitch), one, dtype=torch.uint8)
    sizes = (2, 1, 1, 1, height, width, pitch, *(0, 0), *(1, 1), *(1, 1), *(1, 1), *(1, 0, 1, 1), *(1, 1, 1, 1))
    product[(1,)](x, weight, y, *sizes, 1.0, True, True, 32, 64, 64)
    assert y.flatten().tolist() == [32.0, 16.0]
    columns[(1, 1, 1)](x, t, 2, 1, height * width, 1, pitch, *(0, 1, 1), 8, 64, 64)
    assert t[0, 0, :, 0].tolist() == [two, one]


def trial() -> None:
    """A device whose kernels give wrong numbers is not served by them."""
    from revnets.layers.munit import fp8_conv_triton

    assert fp8_conv._problem("cpu", None) is None
    right = fp8_conv_triton.convolve
    for factor, problem in ((1.01, "its output is off by 1.0e-02"), (1.0, None)):
        fp8_conv_triton.convolve = lambda x, w, y, g, scale, factor=factor: right(x, w, y, g, factor * scale)
        found = wrong(torch.device("cpu"))
        assert found is None if problem is None else found.startswith(problem), found


@needs_triton
def test_interpreted() -> None:
    in_interpreter(
        *("shapes(15)", "chosen_shapes()", "hard_numbers()", "every_tile_and_again()"),
        *("same_layouts()", "kept_and_counted()", "compiled_and_autocast()", "trial()"),
    )


@needs_triton
@pytest.mark.slow
def test_interpreted_many_shapes() -> None:
    in_interpreter("far_addresses()", "shapes(200, 5)")


@needs_triton
@given(
    first=st.integers(0, 5),
    stride=st.integers(1, 6),
    padding=st.integers(0, 5),
    dilation=st.integers(1, 6),
    taps=st.integers(1, 7),
)
def test_taps_that_a_pixel_meets(first: int, stride: int, padding: int, dilation: int, taps: int) -> None:
    from revnets.layers.munit.fp8_conv_triton import _met

    assume(first < stride)
    tap, start, step, count = _met(first, stride, padding, dilation, taps)
    for there in range(3):
        pixel = first + there * stride
        found = {(tap + i * step, start + there - i * step * dilation // stride) for i in range(count)}
        wanted = {(t, o) for t in range(taps) for o in range(-50, 50) if o * stride + t * dilation - padding == pixel}
        assert found == wanted


# --- who decides -----------------------------------------------------------------------------------------------------

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
K3, K1 = (64, 32, 3, 3), (64, 32, 1, 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """A GPU with FP8 units, and what is wrong with the kernels there."""

    def pretend(problem: str | None) -> None:
        monkeypatch.setattr(fp8, "_multiplies_fp8", lambda kind, index: kind == "cuda")
        monkeypatch.setattr(fp8_conv, "_problem", lambda kind, index: problem)

    return pretend


def test_on_a_gpu_with_fp8_units(gpu: Callable[[str | None], None]) -> None:
    gpu(None)
    assert choose(K3, (1, 1), CUDA) == Choice("triton", "by the Triton kernel")
    assert choose(K3, (1, 1), CUDA, backend="scaled_mm").how == "triton"
    assert choose(K1, (0, 0), CUDA) == Choice("scaled_mm", "1x1: a product of matrices")
    assert choose(K1, (0, 0), CUDA, pointwise="triton") == Choice("triton", "1x1: faster than scaled_mm by the table")
    assert choose(K1, (1, 0), CUDA).how == "triton"  # padded: no product of matrices
    assert choose(K3, (1, 1), CUDA, torch.float64) == Choice("emulate", "float64")
    assert choose(K3, (1, 1), CUDA, backend="emulate") == Choice("emulate", "asked for")
    assert choose((64, 1, 3, 3), (1, 1), CUDA, groups=64).how == "plain"


def test_where_the_kernels_do_not_serve(gpu: Callable[[str | None], None]) -> None:
    gpu("Triton is not installed")
    fp8_conv._warn_of_problem.cache_clear()
    with pytest.warns(UserWarning, match="other than 1x1 are emulated, so slowly: Triton is not installed"):
        assert choose(K3, (1, 1), CUDA) == Choice("emulate", "Triton is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(K3, (1, 1), CUDA).how == "emulate"  # said once
        assert choose(K1, (0, 0), CUDA, pointwise="triton").how == "scaled_mm"
    fp8_conv._warn_of_problem.cache_clear()


def test_on_cpus() -> None:
    assert choose(K3, (1, 1), CPU, quiet=True) == Choice("emulate", "the cpu device has no FP8 units")
    assert choose(K1, (0, 0), CPU, backend="scaled_mm").how == "scaled_mm"
    assert choose(K3, (1, 1), CPU, backend="scaled_mm").how == "emulate"
    assert fp8_conv._problem.__wrapped__("cpu", None) in (
        "the kernels are for CUDA devices, not for cpu",
        "Triton is not installed",
    )
    with pytest.raises(ValueError, match="backend='cublas'"):
        choose(K3, (1, 1), CPU, backend="cublas")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_compute_capability(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    old = f"FP8 units came with compute capability 8.9, this device has {capability[0]}.{capability[1]}"
    assert fp8_conv._too_old(0) == (old if capability < (8, 9) else None)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert fp8_conv._too_old(0) == "the kernels are for NVIDIA's GPUs"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_conv, "_too_old", lambda index: None)
    monkeypatch.delitem(sys.modules, "revnets.layers.munit.fp8_conv_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fp8_conv._problem.__wrapped__("cuda", 0) == "Triton is not installed"


def test_what_the_kernels_take() -> None:
    weight, geometry = torch.empty(64, 32, 3, 3, device="meta"), ([1, 1], [0, 0], [1, 1])

    def maps(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    assert can_convolve(maps(2, 32, 8, 8), weight, geometry)
    assert not can_convolve(maps(0, 32, 8, 8), weight, geometry)
    assert not can_convolve(maps(2, 32, 2, 8), weight, geometry)  # smaller than the kernel
    assert can_convolve(maps(2**10, 32, 2**10, 2**10), weight, geometry)
    assert not can_convolve(maps(2**10 + 1, 32, 2**10, 2**10), weight, geometry)
    assert not can_convolve(maps(1, 32, 1, 1), weight, ([1, 1], [2**16, 2**16], [1, 1]))


def test_padded_words() -> None:
    assert padded_words(3, 16) == "channels 3 to 16 padded to 16 to 16"
    assert padded_words(160, 48) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, BF16])
def test_on_this_gpu(kind: torch.dtype, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available() or (problem := fp8_conv._problem("cuda", 0)) is not None:
        pytest.skip(f"needs a GPU that the kernels serve: {problem if torch.cuda.is_available() else 'there is none'}")
    from revnets.layers.munit import fp8_conv_triton

    for kernel, stride, dilation in ((3, 1, 1), (3, 2, 1), (5, 1, 2), (1, 2, 1)):
        case = {"sizes": (4, 72, 28, 20), "outputs": 136, "kernel": (kernel,) * 2, "stride": (stride,) * 2}
        x, weight, geometry = operands({**case, "dilation": (dilation,) * 2, "dtype": kind, "last": last})
        x, weight = (t.detach().cuda().requires_grad_() for t in (x, weight))
        *got, grad = products(x, weight, geometry, "scaled_mm")
        wide = three_products(x.detach(), weight.detach(), grad, geometry, SCALE, GRAD_SCALE)
        for a, w, b in zip(got, wide, exact(x, weight, geometry, grad), strict=True):
            assert off(w, b) < 1e-3
            assert torch.equal(a, w.to(a.dtype))
        for tile in fp8_conv_triton.TILES:
            monkeypatch.setattr(fp8_conv_triton, "_tile", lambda launch, device, key, tile=tile: tile)
            again = products(x, weight, geometry, "scaled_mm", grad)[:3]
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), tile
