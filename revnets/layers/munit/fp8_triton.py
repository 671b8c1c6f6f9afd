"""Clip, cast and transpose in one Triton kernel: Hopper's FP8 product wants both operands with K contiguous in memory.

Imported on first use only, by ``fp8.quantize_both``, whose torch composition is the reference.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS = 128, 64
_FORMATS = {torch.float8_e4m3fn: (4, 3), torch.float8_e5m2: (5, 2)}  # bits of exponent, of mantissa


@triton.jit
def _fp8_code(x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 8 bits of a float32 number within the format's range: to the nearest, ties to even.

    By integers, as releases of Triton, its interpreter and older GPUs do not agree on their own casts. One number is
    still cheaper to compute than to read and write.
    """
    bias: tl.constexpr = 2 ** (EXPONENT - 1) - 1
    dropped: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    odd = (size >> dropped) & 1
    normal = ((size + ((1 << (dropped - 1)) - 1) + odd) >> dropped) - ((127 - bias) << MANTISSA)
    # adding this number shifts the bits of a subnormal one into place, and rounds
    magic: tl.constexpr = (127 - bias + 1 + dropped) << 23
    shifted = size.to(tl.float32, bitcast=True) + tl.full((), magic, tl.int32).to(tl.float32, bitcast=True)
    subnormal = shifted.to(tl.int32, bitcast=True) - magic
    code = tl.where(size < ((127 - bias + 1) << 23), subnormal, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)  # NaN
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _cast_transpose(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    t_ptr,
    rows,
    columns,
    row_stride,
    column_stride,
    top,
    scale,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside, other=0.0)
    x = x.to(tl.float32)
    x = tl.where(x > top, top, tl.where(x < -top, -top, x))  # NaN stays: it is on no side
    y = _fp8_code(x * scale, EXPONENT, MANTISSA)
    tl.store(y_ptr + row[:, None] * columns + column[None, :], y, mask=inside)
    tl.store(t_ptr + column[:, None] * rows + row[None, :], tl.trans(y), mask=tl.trans(inside))


def cast_transpose(x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """``fp8.quantize`` of a matrix, and its transpose, reading the matrix once.

    The bits are those of ``quantize`` where ``scale`` is a power of two, 1 or more; arithmetic is in float32 here, and
    there in the precision of ``x``.

    Args:
        x: ``(M, K)`` in float32, bfloat16 or float16, any strides; on a GPU, or anywhere in Triton's interpreter.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale: a static factor.

    Returns:
        ``(M, K)`` and ``(K, M)``, both contiguous.
    """
    rows, columns = x.shape
    y = torch.empty(rows, columns, dtype=torch.uint8, device=x.device)
    transposed = torch.empty(columns, rows, dtype=torch.uint8, device=x.device)
    if x.numel():
        grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))
        sizes = (rows, columns, *x.stride(), torch.finfo(dtype).max / scale, scale)
        with _on(x.device):  # Triton launches on the current device
            _cast_transpose[grid](x, y, transposed, *sizes, *_FORMATS[dtype], BLOCK_ROWS, BLOCK_COLUMNS)
    return y.view(dtype), transposed.view(dtype)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
