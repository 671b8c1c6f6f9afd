"""FP8 against an independent float64 model of both formats; products, real and emulated; backends."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.layers.munit import fp8
from revnets.layers.munit.fp8 import BACKENDS, E4M3, E5M2, fp8_matmul, fp8_products, quantize, resolve_backend

FORMATS = {E4M3: (4, 3, 7), E5M2: (5, 2, 15)}  # bits of exponent, of mantissa; bias
BOTH = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def decoded(code: int, dtype: torch.dtype) -> float:
    """The number of an 8-bit code, from the definition of the format alone."""
    exponent_bits, mantissa_bits, bias = FORMATS[dtype]
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (2**mantissa_bits - 1)
    if dtype == E4M3 and code & 0x7F == 0x7F:
        return math.nan
    if dtype == E5M2 and exponent == 2**exponent_bits - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def finite(dtype: torch.dtype) -> list[float]:
    """All numbers from zero up, in the order of their codes."""
    return [v for v in (decoded(code, dtype) for code in range(128)) if math.isfinite(v)]


def model(x: float, dtype: torch.dtype) -> float:
    """Clip, then round to the nearest; of two equally near, that with the even code."""
    if math.isnan(x):
        return x
    values = finite(dtype)
    size = min(abs(x), values[-1])
    above = next(i for i, v in enumerate(values) if v >= size)
    below = max(above - (values[above] > size), 0)
    low, high = size - values[below], values[above] - size
    nearest = below if low < high or (low == high and below % 2 == 0) else above
    return math.copysign(values[nearest], x)


def quantized(xs: list[float], dtype: torch.dtype, kind: torch.dtype = torch.float32) -> list[float]:
    return quantize(torch.tensor(xs, dtype=kind), dtype).double().tolist()


def same(got: list[float], expected: list[float]) -> bool:
    pairs = zip(got, expected, strict=True)
    return all(a == b and math.copysign(1, a) == math.copysign(1, b) if b == b else a != a for a, b in pairs)


@BOTH
def test_all_codes(dtype: torch.dtype) -> None:
    values = [decoded(code, dtype) for code in range(256)]
    codes = torch.arange(256, dtype=torch.uint8)
    assert same(codes.view(dtype).double().tolist(), values)
    for code, value in enumerate(values):
        if math.isfinite(value):
            again = quantize(torch.tensor([value], dtype=torch.float32), dtype)
            assert again.view(torch.uint8).item() == code
    assert finite(dtype)[-1] == torch.finfo(dtype).max == {E4M3: 448, E5M2: 57344}[dtype]


@BOTH
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ties_and_their_neighbours(dtype: torch.dtype, kind: torch.dtype) -> None:
    values = finite(dtype)
    ties = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    exact = torch.tensor(ties, dtype=kind)
    held = exact.double() == torch.tensor(ties, dtype=torch.float64)  # float16 has no ties of the least e5m2 numbers
    assert held.sum() >= len(ties) - 4
    exact = exact[held]
    around = torch.cat([exact, *(torch.nextafter(exact.float(), torch.tensor(to)).to(kind) for to in (0.0, 1e9))])
    around = torch.cat([around, -around])
    assert same(quantize(around, dtype).double().tolist(), [model(x, dtype) for x in around.double().tolist()])


@BOTH
def test_saturation_infinities_and_nan(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        got = quantized([top * 1.01, top * 1.1, top * 2, 3e38, math.inf, -math.inf, -3e38], dtype, kind)
        assert got == [top] * 5 + [-top] * 2
        assert math.isnan(quantized([math.nan], dtype, kind)[0])


@BOTH
def test_subnormals_and_what_becomes_zero(dtype: torch.dtype) -> None:
    least = finite(dtype)[1]
    assert least == {E4M3: 2.0**-9, E5M2: 2.0**-16}[dtype]
    got = quantized([least, least / 2, least * 0.51, -least / 2, least * 1.5, least * 2.5, 1e-30], dtype)
    assert same(got, [least, 0.0, least, -0.0, 2 * least, 2 * least, 0.0])


@settings(max_examples=200, deadline=None)
@given(x=st.floats(width=32), e4m3=st.booleans())
def test_any_number(x: float, e4m3: bool) -> None:
    dtype = E4M3 if e4m3 else E5M2
    assert same(quantized([x], dtype), [model(x, dtype)])


def test_many_random_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in FORMATS:
        top = math.log2(torch.finfo(dtype).max)
        xs = 2 ** (torch.rand(3000, generator=generator) * (top + 22) - 20)
        xs *= torch.randn(3000, generator=generator).sign()
        assert same(quantize(xs, dtype).double().tolist(), [model(x, dtype) for x in xs.double().tolist()])


# --- products --------------------------------------------------------------------------------------------------------


def operands(m: int, n: int, k: int, kinds: tuple[torch.dtype, torch.dtype], device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(m * n * k)
    return quantize(torch.randn(m, k, device=device), kinds[0]), quantize(torch.randn(n, k, device=device), kinds[1])


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [(E4M3, E4M3), (E5M2, E4M3)])
@pytest.mark.parametrize("shape", [(64, 48, 32), (7, 5, 19), (33, 16, 300), (1, 1, 1)])
def test_emulated_and_real_products(
    shape: tuple[int, int, int], kinds: tuple[torch.dtype, torch.dtype], dtype: torch.dtype, device: str
) -> None:
    if device == "cuda" and not (torch.cuda.is_available() and fp8._multiplies_fp8("cuda", None)):
        pytest.skip("needs a GPU that multiplies FP8")
    a, b = operands(*shape, kinds, device)
    emulated, real = (fp8_matmul(a, b, 0.37, dtype, backend) for backend in ("emulate", "scaled_mm"))
    assert emulated.dtype == real.dtype == dtype
    assert emulated.shape == real.shape == shape[:2]
    error = (emulated.double() - real.double()).norm() / real.double().norm()
    assert error < 1e-3
    exact = a.double() @ b.double().t() * 0.37
    assert torch.allclose(emulated.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5, 19), (16, 16, 17), (16, 32, 48)])
def test_padding_changes_no_number(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = operands(m, n, k, (E5M2, E4M3), "cpu")
    wide_a, wide_b = fp8._padded(a), fp8._padded(b)
    assert all(size % 16 == 0 for size in (*wide_a.shape, *wide_b.shape))
    padded = fp8._scaled_mm(wide_a, wide_b, 0.5, torch.float32)
    assert torch.allclose(padded[:m, :n], fp8_matmul(a, b, 0.5, torch.float32, "emulate"), rtol=1e-5, atol=1e-6)
    assert not padded[m:].any()
    assert not padded[:, n:].any()


def test_products_are_counted_and_empty_ones_work() -> None:
    fp8_products(reset=True)
    a, b = operands(4, 3, 8, (E4M3, E4M3), "cpu")
    fp8_matmul(a, b, 1.0, torch.float32, "scaled_mm")
    fp8_matmul(a, b, 1.0, torch.float32, "emulate")
    assert fp8_matmul(a[:0], b, 1.0, torch.float32, "scaled_mm").shape == (0, 3)
    assert not fp8_matmul(a[:, :0], b[:, :0], 1.0, torch.float32, "scaled_mm").any()
    assert fp8_products(reset=True) == {"scaled_mm": 1, "emulate": 3}


def test_products_ignore_autocast() -> None:
    a, b = operands(8, 8, 500, (E4M3, E4M3), "cpu")
    for backend in BACKENDS:
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = fp8_matmul(a, b, 0.1, dtype, backend)
            assert torch.equal(inside, fp8_matmul(a, b, 0.1, dtype, backend))


# --- backends --------------------------------------------------------------------------------------------------------


def test_falling_back_is_said_once() -> None:
    fp8._warn_of_emulation.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [resolve_backend(None, torch.device("cpu")) for _ in range(3)] == ["emulate"] * 3
        assert resolve_backend("emulate", torch.device("cpu")) == "emulate"
    assert len(caught) == 1
    assert "FP8 is emulated: this cpu device has no FP8 units" in str(caught[0].message)


def test_backends() -> None:
    cpu = torch.device("cpu")
    assert resolve_backend("scaled_mm", cpu) == "scaled_mm"
    assert resolve_backend("scaled_mm", cpu, torch.float64) == "emulate"
    assert resolve_backend(None, torch.device("meta")) == "emulate"
    with pytest.raises(ValueError, match="backend='cublas': expected one of scaled_mm, emulate, or None"):
        resolve_backend("cublas", cpu)


def test_hardware_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_multiplies_fp8", lambda kind, index: False)
    with pytest.raises(
        RuntimeError, match=r"backend='scaled_mm': this torch .* multiplies no FP8 on cpu; use backend="
    ):
        resolve_backend("scaled_mm", torch.device("cpu"))


def test_the_private_function_of_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = operands(16, 16, 32, (E5M2, E4M3), "cpu")
    expected = fp8_matmul(a, b, 0.3, torch.float32, "scaled_mm")
    monkeypatch.delattr(torch.nn.functional, "scaled_mm", raising=False)
    assert torch.equal(fp8_matmul(a, b, 0.3, torch.float32, "scaled_mm"), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, E4M3])
def test_what_is_not_floating(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"quantize: got an input of torch.*expected float16, bfloat16, float32"):
        quantize(torch.zeros(3).to(dtype), E4M3)
