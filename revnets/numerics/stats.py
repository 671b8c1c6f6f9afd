"""What one tensor loses in FP8, without casting it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = {torch.float8_e4m3fn: 2.0**-9, torch.float8_e5m2: 2.0**-16}
"""The smallest positive number of each format, a subnormal one."""


@dataclass(frozen=True)
class TensorStats:
    """Figures of one tensor, or of several taken together.

    Attributes:
        rms: root of the mean square.
        flushed: share of all numbers that are not zero but become zero in the cast; None where nothing is cast.
        clipped: share of all numbers that lie beyond the format's range.
    """

    rms: float
    flushed: float | None = None
    clipped: float | None = None


class StatsSum:
    """Adds tensors up, on their device and without waiting for it."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: Tensor | None = None
        self._cast = False

    def add(self, x: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
        """Count a tensor in; see ``tensor_stats``."""
        found = _sums(x, dtype, scale)
        self.count += x.numel()
        self._cast = self._cast or dtype is not None
        self._sums = found if self._sums is None else self._sums.add_(found)

    def result(self) -> TensorStats | None:
        """The figures of all tensors together; None where there were none. Waits for the device."""
        if self._sums is None or not self.count:
            return None
        squares, flushed, clipped = (value / self.count for value in self._sums.tolist())
        return TensorStats(squares**0.5, *((flushed, clipped) if self._cast else ()))


def tensor_stats(x: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0) -> TensorStats:
    """RMS of a tensor, and the shares of its numbers that a cast to FP8 would flush to zero and clip.

    NaN and infinity show in the RMS; infinities count as clipped.

    Args:
        x: floating, any shape, with at least one number.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``; None: no cast.
        scale: static factor before the cast.

    Example:
        >>> tensor_stats(torch.tensor([2.0**-20, 0.0, 0.0, 512.0]), torch.float8_e4m3fn)
        TensorStats(rms=256.0, flushed=0.25, clipped=0.25)
    """
    total = StatsSum()
    total.add(x, dtype, scale)
    found = total.result()
    if found is None:
        raise ValueError(f"tensor_stats: a tensor of shape {tuple(x.shape)} has no numbers: expected one at least")
    return found


@torch.no_grad()
def _sums(x: Tensor, dtype: torch.dtype | None, scale: float) -> Tensor:
    """Sum of squares, number of flushed and of clipped values, in float64."""
    x = x.detach()
    squares = torch.linalg.vector_norm(x, dtype=torch.float64).square()
    if dtype is None:
        return torch.stack([squares, *squares.new_zeros(2)])
    size = x.abs()
    if size.dtype in (torch.float16, torch.bfloat16):
        size = size.float()
    # half of the least number is a tie, which goes to the even one: zero
    flushed = torch.count_nonzero((size <= LEAST[dtype] / 2 / scale) & (size > 0))
    clipped = torch.count_nonzero(size > torch.finfo(dtype).max / scale)
    return torch.stack([squares, flushed.double(), clipped.double()])
