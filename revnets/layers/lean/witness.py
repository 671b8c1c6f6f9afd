"""A few numbers of each tensor that is dropped, which what is computed again has to agree with.

A recipe is wrong where something wrote to a tensor unseen: ``h.data.mul_(2)``, a write without gradient that autograd's
graph does not show, a foreign kernel. Gradients would then be wrong without a word.
"""

from __future__ import annotations

import ctypes
from array import array
from itertools import count
from typing import Any

import torch
from torch import Tensor

PLACES = 16
"""Numbers that are remembered of a tensor: each lies in memory that the caches have let go, and costs a trip there."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far they may be off, as a share of the largest of them: rounding, of sums that nearly cancel, too.

Numbers of 16 bits are not compared: a batch norm whose weights have 16 bits, too, comes back some percent off.
"""

_BITS: dict[torch.dtype, tuple[Any, str]] = {
    torch.float64: (ctypes.c_uint64 * 2**50, "Q"),
    torch.float32: (ctypes.c_uint32 * 2**50, "I"),
}
"""Memory as whole numbers, and their code in ``array``: an operator that gathers them would take five times as long."""

_turns = count()


class ComputedOtherwise(RuntimeError):
    """A tensor that was computed again is not what the forward pass had."""

    @classmethod
    def at(cls, shape: torch.Size, found: float, expected: float, what: str = "") -> ComputedOtherwise:
        """The sentence for a tensor of a shape that holds one number in place of another."""
        return cls(
            f"lean: a tensor of shape {tuple(shape)} was computed again for the backward pass and holds "
            f"{found:.6g}{what} where it held {expected:.6g}: after its conversion the network began to write to "
            "results unseen by autograd (through .data, .detach() or torch.no_grad()), or runs a kernel that writes to "
            "its inputs; write out of place, or use revnets.layers.make_lean(model) on the plain network, which looks "
            "at every operator"
        )


class Witness:
    """Numbers at some places of a tensor, each time at others.

    Example:
        >>> x = torch.arange(64.0)
        >>> witness = Witness.of(x)
        >>> witness.check(x.clone())
        >>> try:
        ...     witness.check(2 * x)
        ... except ComputedOtherwise:
        ...     print("another tensor")
        another tensor
    """

    __slots__ = ("bits", "kind", "start", "step", "stride")

    def __init__(self, tensor: Tensor, start: int, step: int) -> None:
        self.start, self.step, self.stride = start, step, tensor.stride()
        self.kind = tensor.dtype, tensor.numel()
        self.bits = self._bits(tensor)

    @classmethod
    def of(cls, tensor: Tensor) -> Witness | None:
        """Of a tensor in a CPU's memory without gaps (elsewhere, looking would wait for the device), else None."""
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype not in TOLERANCE:
            return None
        size = tensor.numel()
        if not _is_dense(tensor) or not tensor.data_ptr():
            return None
        step = (size // PLACES - 1) | 1  # an odd one, or planes of even size would be seen in one column
        if step < 1:
            return None
        return cls(tensor, next(_turns) % (size - (PLACES - 1) * step), step)

    def _bits(self, tensor: Tensor) -> list[int]:
        numbers: list[int] = _BITS[tensor.dtype][0].from_address(tensor.data_ptr())[
            self.start : self.start + PLACES * self.step : self.step
        ]
        return numbers

    def check(self, tensor: Tensor) -> None:
        """Compare with a tensor that was computed again.

        Raises:
            ComputedOtherwise: where it is another one.
        """
        if (tensor.dtype, tensor.numel()) != self.kind or not tensor.data_ptr():
            raise ComputedOtherwise.at(tensor.shape, tensor.numel(), self.kind[1], " numbers")
        if tensor.stride() != self.stride and _lies(tensor, tensor.stride()) != _lies(tensor, self.stride):
            return
        bits = self._bits(tensor)
        if bits == self.bits:
            return
        expected, found = (_numbers(one, tensor.dtype) for one in (self.bits, bits))
        largest = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0
        wrong = (found - expected).abs() > TOLERANCE[tensor.dtype] * largest
        wrong |= found.isnan() != expected.isnan()
        if wrong.any():
            place = int(wrong.nonzero()[0, 0])
            raise ComputedOtherwise.at(tensor.shape, float(found[place]), float(expected[place]))


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return True
    with torch._C._DisableTorchDispatch():  # a recorder need not hear of it
        return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _numbers(bits: list[int], dtype: torch.dtype) -> Tensor:
    """The numbers that have these bits, in double precision."""
    return torch.frombuffer(array(_BITS[dtype][1], bits), dtype=dtype).double()


def _lies(tensor: Tensor, strides: tuple[int, ...]) -> tuple[int, ...]:
    """How a tensor of these strides lies in memory: those that matter."""
    return tuple(stride for size, stride in zip(tensor.shape, strides, strict=True) if size > 1)
