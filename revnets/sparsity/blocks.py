"""Zeros in blocks of input channels: where a pattern asks for them, masks have one place for each block.

The pattern ``4x1`` has zeros in groups of four consecutive input channels of an output (and of one place of a kernel),
which the INT8 kernel of ``revnets deploy`` skips. A block of 1 is a single weight. Pure functions of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCKED = "4x1"
"""The pattern of zeros in blocks of four input channels."""


def block_of(pattern: str | None) -> int:
    """How many input channels of an output are zero together.

    Args:
        pattern: ``4x1``, or None for single weights.

    Raises:
        ValueError: for any other one.

    Example:
        >>> block_of("4x1"), block_of(None)
        (4, 1)
    """
    if pattern not in (None, BLOCKED):
        raise ValueError(f"pattern={pattern!r}: expected {BLOCKED!r}, zeros in blocks of four input channels")
    return 1 if pattern is None else 4


def shape_of_blocks(shape: Sequence[int], of: int) -> tuple[int, ...]:
    """The shape of a mask of blocks.

    Raises:
        ValueError: where the input channels (of a group) make no whole blocks.

    Example:
        >>> shape_of_blocks((8, 16, 3, 3), 4)
        (8, 4, 3, 3)
    """
    if of > 1 and shape[1] % of:
        raise ValueError(
            f"it has {shape[1]} input channels per group, where zeros in blocks of {of} need a multiple of {of}"
        )
    return (shape[0], shape[1] // of, *shape[2:]) if of > 1 else tuple(shape)


def norms(numbers: Tensor, of: int) -> Tensor:
    """The size of each block of numbers: its Euclidean norm, of one number the magnitude.

    Example:
        >>> norms(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), 4)
        tensor([[5.]])
    """
    return numbers.abs() if of == 1 else torch.linalg.vector_norm(numbers.unflatten(1, (-1, of)), dim=2)


def of_blocks(mask: Tensor, of: int) -> Tensor:
    """A mask of weights, which holds whole blocks only, as one of blocks."""
    return mask if of == 1 else mask.unflatten(1, (-1, of))[:, :, 0]


def spread(mask: Tensor, of: int) -> Tensor:
    """A mask of blocks as one of weights.

    Example:
        >>> spread(torch.tensor([[True, False]]), 2)
        tensor([[ True,  True, False, False]])
    """
    return mask if of == 1 else mask.repeat_interleave(of, 1)


def is_whole(mask: Tensor, of: int) -> bool:
    """Whether each block of a mask is all there or not at all.

    Example:
        >>> is_whole(torch.tensor([[True, False]]), 1), is_whole(torch.tensor([[True, False]]), 2)
        (True, False)
    """
    return of == 1 or torch.equal(spread(of_blocks(mask, of), of), mask)
