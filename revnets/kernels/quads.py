"""Compressed weights by quads: four output channels that share what is loaded (``quads.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .build import load_kernel

QUAD = 4
PATTERNS = 1 << QUAD
MIN_WEIGHTS = 9.0  # of an output channel and a chunk, on average: of fewer, leaving the loops takes too long


def pay(weights: float) -> bool:
    """Whether a layer is faster by quads than channel by channel, with the vectors of this machine.

    Args:
        weights: of an output channel and a chunk, on average.
    """
    return weights >= MIN_WEIGHTS and bool(load_kernel().revnets_quads())


def in_quads(
    values: Tensor, columns: Tensor, rows: Tensor, groups: int, chunks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compressed weights of chunk after chunk, sorted by quads.

    Args:
        values: as ``in_chunks`` gives them.
        columns: likewise.
        rows: likewise.
        groups: of the convolution: the last quad of each may have fewer channels.
        chunks: of its inputs.

    Returns:
        Values: of each chunk and quad, input by input, of the channels that have a weight for it. Columns: these
        inputs, those first that fewer channels need, see the last. Rows: where the values of each chunk and quad begin,
        and the end, and behind them the same of the columns. Counts: int16 ``(chunks * quads, 16)``, how many inputs
        are needed by the channels of each of the 16 sets.

    Example:
        >>> channels = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3])  # two of them
        >>> values, columns, rows, counts = in_quads(*channels, 1, 1)
        >>> values.tolist(), columns.tolist(), rows.tolist(), counts.nonzero().tolist()
        ([1.0, 2.0, 3.0], [0, 1], [0, 3, 0, 2], [[0, 1], [0, 3]])
    """
    lines = len(rows) - 1
    outputs = lines // chunks  # of all groups
    per_group = outputs // groups
    quads = -(-per_group // QUAD)
    line = torch.repeat_interleave(torch.arange(lines, device=rows.device), rows.diff().long(), output_size=len(values))
    chunk, output = line // max(outputs, 1), line % max(outputs, 1)
    group, channel = output // max(per_group, 1), output % max(per_group, 1)
    quad = (chunk * groups + group) * quads + channel // QUAD
    place, number = channel % QUAD, chunks * groups * quads
    width = int(columns.max()) + 1 if len(columns) else 1
    inputs, owner = torch.unique(quad * width + columns.long(), return_inverse=True)
    pattern = torch.zeros(len(inputs), dtype=torch.int64, device=rows.device).index_add_(0, owner, 1 << place)
    order = ((inputs // width * PATTERNS + pattern) * width + inputs % width).argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=rows.device)
    counts = torch.bincount(inputs // width * PATTERNS + pattern, minlength=number * PATTERNS)
    per_quad = counts.view(number, PATTERNS)
    starts = torch.zeros(2, number + 1, dtype=torch.int32, device=rows.device)
    bits = torch.tensor([bin(p).count("1") for p in range(PATTERNS)], device=rows.device)
    starts[0, 1:] = (per_quad * bits).sum(1).cumsum(0)
    starts[1, 1:] = per_quad.sum(1).cumsum(0)
    in_order = (rank[owner] * QUAD + place).argsort()
    return values[in_order], (inputs % width)[order].to(torch.int16), starts.flatten(), per_quad.to(torch.int16)
