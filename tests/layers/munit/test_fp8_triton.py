"""The fused clip, cast and transpose: bit for bit the torch composition, in Triton's interpreter and on GPUs."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from revnets.layers import MuSConv2d, MuSLinear, quantize
from revnets.layers.munit import fp8
from revnets.layers.munit.fp8 import E4M3, E5M2

pytest.importorskip("triton", reason="Triton is not installed")

FORMATS = (E4M3, E5M2)
KINDS = (torch.float32, torch.bfloat16, torch.float16)


def numbers(rows: int, columns: int, dtype: torch.dtype, scale: float) -> Tensor:
    """Of all sizes, with every code, the ties between them, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-26, 20, (rows, columns), generator=generator)
    x = torch.randn(rows, columns, generator=generator) * 2.0**exponents
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = codes[codes.isfinite()].sort().values
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e38, 1e-40])
    values = torch.cat([values, (values[1:] + values[:-1]) / 2, special]) / scale
    x.view(-1)[: len(values)] = values
    return x


def assert_same_bits(device: str = "cpu") -> None:
    from revnets.layers.munit.fp8_triton import cast_transpose

    for dtype in FORMATS:
        for kind in KINDS:
            for scale in (1.0, 2.0**10):
                x = numbers(150, 70, dtype, scale).to(kind).to(device)
                for view in (x, x.t(), x[::2, ::3], x[:1].expand(40, 70), x[:0], x[:, :1]):
                    expected = quantize(view, dtype, scale)
                    pair = cast_transpose(view, dtype, scale)
                    for got, wanted in zip(pair, (expected, expected.t()), strict=True):
                        assert got.is_contiguous()
                        assert got.shape == wanted.shape
                        nan = wanted.float().isnan()
                        assert torch.equal(got.float().isnan(), nan)
                        same = got.view(torch.uint8) == wanted.contiguous().view(torch.uint8)
                        assert (same | nan).all(), (dtype, kind, scale, tuple(view.shape))


def test_interpreted() -> None:
    code = "from tests.layers.munit.test_fp8_triton import assert_same_bits; assert_same_bits()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["*fp32", "*bf16"])
def test_it_compiles_without_a_gpu(kind: str, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from revnets.layers.munit.fp8_triton import _cast_transpose

    types = (kind, "*u8", "*u8", "i32", "i32", "i64", "i64", "fp32", "fp32", *["constexpr"] * 4)
    names = _cast_transpose.arg_names
    constants = dict(zip(names[-4:], (4, 3, 128, 64), strict=True))
    source = ASTSource(_cast_transpose, dict(zip(names, types, strict=True)), constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "ptx" in made.asm


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    assert_same_bits("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fp8._kernel("cuda", None) is not None


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and fp8._multiplies_fp8("cuda", None)), reason="needs a GPU that multiplies FP8"
)
@pytest.mark.parametrize("kind", ["linear", "1x1", "1x1 channels-last"])
def test_training_with_it_and_without(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear = kind == "linear"
    layer = (MuSLinear(64, 48, fp8=True) if linear else MuSConv2d(64, 48, 1, fp8=True)).cuda()
    x = torch.randn((128, 64) if linear else (4, 64, 8, 8), device="cuda", requires_grad=True)
    given = x.contiguous(memory_format=torch.channels_last) if "last" in kind else x
    found = []
    for kernel in (fp8._kernel("cuda", 0), None):
        monkeypatch.setattr(fp8, "_kernel", lambda kind, index, kernel=kernel: kernel)
        y = layer(given)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_kernel_that_does_not_work_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8._kernel.cache_clear()
    with pytest.warns(UserWarning, match="FP8 without its fused Triton kernel, so more slowly: "):
        assert fp8._kernel("cpu", None) is None  # Triton compiles nothing for CPUs
    fp8._kernel.cache_clear()


@pytest.mark.parametrize("backend", ["emulate", "scaled_mm"])
def test_the_composition(backend: str) -> None:
    x = torch.randn(5, 7)
    quantized, transposed = fp8.quantize_both(x, E5M2, 8.0, backend)
    assert torch.equal(quantized.float(), quantize(x, E5M2, 8.0).float())
    assert torch.equal(transposed.float(), quantized.float().t())
