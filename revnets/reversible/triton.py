"""Exact mode's kernels in Triton, for CUDA and Triton's interpreter: the stream's rounding and adding, its range.

Imported on first use only, by ``cuda.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stream_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    value_ptr,
    out_ptr,
    constant,
    channels,
    pixels,
    x_n,
    x_c,
    x_p,
    v_n,
    v_c,
    v_p,
    o_n,
    o_c,
    o_p,
    SUBTRACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``x + r`` or ``x - r``, r being the value rounded to the grid: ``(value + constant) - constant``."""
    n = tl.program_id(2).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)[None, :]
    inside = (c < channels) & (p < pixels)
    x = tl.load(x_ptr + n * x_n + c * x_c + p * x_p, mask=inside, other=0.0)
    value = tl.load(value_ptr + n * v_n + c * v_c + p * v_p, mask=inside, other=0.0).to(tl.float32)
    rounded = (value + constant) - constant
    x = x - rounded if SUBTRACT else x + rounded
    tl.store(out_ptr + n * o_n + c * o_c + p * o_p, x, mask=inside)


@triton.jit
def max_abs_kernel(  # type: ignore[no-untyped-def]
    out_ptr, a_ptr, b_ptr, c_ptr, d_ptr, a_size, b_size, c_size, d_size, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Largest magnitudes of up to four float32 maps without gaps, each by PARTS: ``(4, PARTS)``; NaN is larger."""
    part, which = tl.program_id(0), tl.program_id(1)
    x_ptr, size = a_ptr, tl.zeros((), tl.int64) + a_size
    if which == 1:
        x_ptr, size = b_ptr, tl.zeros((), tl.int64) + b_size
    if which == 2:
        x_ptr, size = c_ptr, tl.zeros((), tl.int64) + c_size
    if which == 3:
        x_ptr, size = d_ptr, tl.zeros((), tl.int64) + d_size
    largest = tl.zeros((BLOCK,), tl.int32)
    start = part.to(tl.int64) * BLOCK
    while start < size:
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < size, other=0.0)
        largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))  # in the order of the numbers, NaN above
        start += PARTS * BLOCK
    tl.store(out_ptr + which * PARTS + part, tl.max(largest, axis=0).to(tl.float32, bitcast=True))
