"""The stream's rounding, addition and subtraction in one Triton kernel, for CUDA and Triton's interpreter.

Imported on first use only, by ``cuda.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiles import blocks, grid, layout, on


@triton.jit
def _stream_kernel(  # type: ignore[no-untyped-def]
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


def stream(x: Tensor, value: Tensor, out: Tensor, constant: float, subtract: bool) -> None:
    """``out = x + r`` or ``x - r``; ``out`` may be ``x`` itself.

    Args:
        x: float32, see ``tiles.suits``.
        value: as large, in any precision that the kernels know.
        out: float32.
        constant: see ``grid.rounding_constant``.
        subtract: or add.
    """
    block = blocks(x)
    sizes = (x.shape[1], x.shape[2] * x.shape[3], *layout(x), *layout(value), *layout(out))
    with on(x.device):
        _stream_kernel[grid(x, block)](x, value, out, constant, *sizes, SUBTRACT=subtract, **block)
