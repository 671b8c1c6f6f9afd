"""The fixed grid of exact mode: why addition and subtraction lose nothing.

A float32 number below ``2^(24-k)`` that is a multiple of ``2^-k`` is exact, and so are sums and differences of such
numbers. Exact mode therefore rounds what is *added* to the stream to multiples of ``2^-k``: then ``(x + r) - r == x``
to the bit, whatever the precision in which the branch was computed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import RangeError, ReversibleError
from .operators import calls, operator

DEFAULT_GRID_BITS = 12
"""k of the default grid: steps of ``2^-12`` (finer than TF32 or bfloat16 at 1), range ±512 in float32."""

_MANTISSA_BITS = {torch.float32: 23, torch.float64: 52}


def resolve_grid_bits(exact: bool | int) -> int | None:
    """Translate the ``exact`` argument of ops and models into k of the grid ``2^-k``, or None for plain addition.

    Example:
        >>> resolve_grid_bits(True), resolve_grid_bits(14), resolve_grid_bits(False)
        (12, 14, None)

    Raises:
        ValueError: if ``exact`` is an integer outside 1 to 20.
    """
    if isinstance(exact, bool):
        return DEFAULT_GRID_BITS if exact else None
    if not isinstance(exact, int) or not 1 <= exact <= 20:
        raise ValueError(f"exact={exact}: expected True, False, or the grid's k between 1 and 20 (steps of 2^-k)")
    return exact


def grid_limit(grid_bits: int, dtype: torch.dtype) -> float:
    """Largest magnitude of stream values that the grid covers: ``2^(m-2-k)``, m the mantissa bits of ``dtype``.

    Two bits of head-room: one for the sum of the branches (at most twice the limit), one for the rounding constant.
    """
    return 2.0 ** (_MANTISSA_BITS[dtype] - 2 - grid_bits)


@operator("round_to_grid(Tensor x, float constant) -> Tensor")
def _rounded(x: Tensor, constant: float) -> Tensor:
    return (x + constant).sub_(constant)


@operator("add_rounded(Tensor x, Tensor value, float constant) -> Tensor")
def add_rounded_in_a_row(x: Tensor, value: Tensor, constant: float) -> Tensor:
    """``x`` plus the rounded value, by torch's own kernels."""
    return (value.to(x.dtype) + constant).sub_(constant).add_(x)


@operator("sub_rounded_(Tensor(a!) x, Tensor value, float constant) -> ()")
def sub_rounded_in_a_row(x: Tensor, value: Tensor, constant: float) -> None:
    """Subtract the rounded value in place, by torch's own kernels."""
    x.sub_((value.to(x.dtype) + constant).sub_(constant))


@operator("sub_rounded_owned_(Tensor(a!) x, Tensor(b!) value, float constant) -> ()")
def _sub_rounded_owned(x: Tensor, value: Tensor, constant: float) -> None:
    if value.dtype != x.dtype:
        return sub_rounded_in_a_row(x, value, constant)
    x.sub_(value.add_(constant).sub_(constant))


@operator("max_abs(Tensor[] xs) -> Tensor")
def max_abs_of_each(xs: Sequence[Tensor]) -> Tensor:
    """Largest magnitudes, ``(len(xs), parts)``: the largest of a row is that of one map."""
    return torch.stack([_max_abs(x) for x in xs])[:, None]


def _max_abs(x: Tensor) -> Tensor:
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)  # contiguous: reduces several times faster on CPU
    if not x.numel():
        return x.new_zeros(())
    low, high = torch.aminmax(x)
    return torch.maximum(high, -low)


class _RoundToGrid(torch.autograd.Function):
    """Rounding with the identity as its gradient (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, constant: float) -> Tensor:
        if torch.compiler.is_compiling():  # to be fused with what is around it
            return (x + constant) - constant
        return calls.round_to_grid(x, constant)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AddRounded(torch.autograd.Function):
    """``x`` plus the rounded value; the gradient passes to both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, constant: float) -> Tensor:
        ctx.dtype = value.dtype
        return calls.add_rounded(x, value, constant)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad.to(ctx.dtype), None


def rounding_constant(grid_bits: int, dtype: torch.dtype) -> float:
    """What is added and subtracted again to push the bits below the grid out of the mantissa: ``1.5 * 2^(m-k)``.

    Raises:
        ReversibleError: for half-precision numbers, which have too few bits for a useful grid.
    """
    if dtype not in _MANTISSA_BITS:
        raise ReversibleError(
            f"exact mode needs a float32 or float64 stream, got {str(dtype).removeprefix('torch.')}: keep the model "
            "in float32 and use torch.autocast for half precision, or pass exact=False"
        )
    return 1.5 * 2.0 ** (_MANTISSA_BITS[dtype] - grid_bits)


def round_to_grid(x: Tensor, grid_bits: int) -> Tensor:
    """Round ``x`` to the nearest multiple of ``2^-k``; the gradient passes unchanged.

    Args:
        x: any shape, float32 or float64.
        grid_bits: k.

    Raises:
        ReversibleError: for another dtype.

    Example:
        >>> round_to_grid(torch.tensor([0.3, 1.0]), 2)
        tensor([0.2500, 1.0000])
    """
    constant = rounding_constant(grid_bits, x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _RoundToGrid.apply(x, constant)
    return calls.round_to_grid(x, constant)


def add_rounded(x: Tensor, value: Tensor, grid_bits: int) -> Tensor:
    """``x`` plus ``value`` rounded to the grid of ``x``; differentiable in both.

    Example:
        >>> add_rounded(torch.ones(1), torch.tensor([0.3]), 2)
        tensor([1.2500])
    """
    return _AddRounded.apply(x, value, rounding_constant(grid_bits, x.dtype))


def sub_rounded_(x: Tensor, value: Tensor, grid_bits: int, owned: bool = False) -> None:
    """Subtract ``value``, rounded to the grid of ``x``, from ``x`` in place; what is ``owned`` may be overwritten."""
    subtract = calls.sub_rounded_owned_ if owned else calls.sub_rounded_
    subtract(x, value, rounding_constant(grid_bits, x.dtype))


def max_abs(*xs: Tensor) -> Tensor:
    """Largest magnitudes of maps of one type, ``(len(xs), parts)`` on their device: that of a map is its row's largest.

    NaN where there is one.
    """
    return calls.max_abs([x.detach() for x in xs])


def check_range(value: float, grid_bits: int, dtype: torch.dtype, where: str) -> None:
    """Raise a sentence when ``value`` is not within the grid's range.

    Raises:
        RangeError: naming the op, the value, and the grid that would hold it.
    """
    limit = grid_limit(grid_bits, dtype)
    if value <= limit:
        return
    if not math.isfinite(value):
        raise RangeError(
            f"{where}: its output holds {value}: lower the learning rate, clip gradients, or look for bad input; "
            "the reversible backward pass cannot rebuild activations from non-finite values"
        )
    bits = grid_bits - math.ceil(math.log2(value / limit))
    advice = f"pass exact={bits} (range ±{grid_limit(bits, dtype):g})" if bits >= 1 else "pass exact=False"
    raise RangeError(
        f"{where}: |output| reaches {value:g}, beyond the range ±{limit:g} of the exact grid 2^-{grid_bits}: {advice}"
    )
