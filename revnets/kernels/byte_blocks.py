"""Bytes in blocks of four channels, as the byte kernel reads them: activations, and the weights that are not all 0."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_BLOCKS = 2**15  # of int16


def fours(channels: int) -> int:
    """Channels, rounded up.

    Example:
        >>> fours(3), fours(8)
        (4, 8)
    """
    return -(-channels // 4) * 4


def to_blocks(x: Tensor) -> Tensor:
    """Any tensor ``(N, C, H, W)`` as ``(N, C / 4, H, W, 4)``, missing channels 0."""
    n, channels, height, width = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, fours(channels) - channels))
    return x.reshape(n, -1, 4, height, width).permute(0, 1, 3, 4, 2).contiguous()


def from_blocks(x: Tensor, channels: int | None = None) -> Tensor:
    """``(N, C / 4, H, W, 4)`` as ``(N, C, H, W)``, as many channels of it."""
    return x.permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :channels].contiguous()


def compress_bytes(weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of four input channels that hold a non-zero, output channel after output channel.

    Args:
        weight: int8, ``(C_out, C_in / groups, kh, kw)``.
        groups: of the convolution; others' channels are zeros, which are not kept.

    Returns:
        values (int8, ``(blocks, 4)``), columns (int16: tap * C_in / 4 + which four), rows (int32).

    Raises:
        ValueError: for more than 32,768 blocks in a row, dense.

    Example:
        >>> weight = torch.tensor([[0, 0, 0, 0, 1, 0, 2, 0, 3]], dtype=torch.int8)[:, :, None, None]
        >>> [part.tolist() for part in compress_bytes(weight)]
        [[[1, 0, 2, 0], [3, 0, 0, 0]], [1, 2], [0, 2, 2, 2, 2]]
    """
    outputs, inputs, height, width = weight.shape
    dense = weight.new_zeros(fours(outputs), fours(inputs * groups), height, width)
    each = outputs // groups
    for group in range(groups):
        ours = slice(group * each, (group + 1) * each)
        dense[ours, group * inputs : (group + 1) * inputs] = weight.detach()[ours]
    blocks = dense.permute(0, 2, 3, 1).reshape(len(dense), -1, 4)
    if blocks.shape[1] > _MOST_BLOCKS:
        raise ValueError(f"a weight of shape {tuple(weight.shape)}: expected at most {4 * _MOST_BLOCKS} per channel")
    kept = (blocks != 0).any(2)
    rows = torch.zeros(len(dense) + 1, dtype=torch.int32, device=weight.device)
    rows[1:] = kept.sum(1).cumsum(0)
    return blocks[kept], kept.nonzero()[:, 1].to(torch.int16), rows


def decompress_bytes(values: Tensor, columns: Tensor, rows: Tensor, inputs: int, taps: tuple[int, int]) -> Tensor:
    """The dense weight again, ``(C_out, C_in, kh, kw)``, channels in fours, one group."""
    outputs = len(rows) - 1
    dense = values.new_zeros(outputs, math.prod(taps) * (fours(inputs) // 4), 4)
    dense[torch.repeat_interleave(torch.arange(outputs), rows.diff().long()), columns.long()] = values
    return dense.reshape(outputs, *taps, fours(inputs)).permute(0, 3, 1, 2).contiguous()


def reciprocal(scale: float) -> float:
    """Of a scale, in float32.

    Raises:
        ValueError: for none that is above 0.
    """
    if not scale > 0.0 or not math.isfinite(scale):
        raise ValueError(f"scale={scale}: expected a number above 0")
    return float(1.0 / torch.tensor(scale, dtype=torch.float32))
