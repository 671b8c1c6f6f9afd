"""Blocks of four int8 weights by twos, as processors without VNNI multiply them exactly: ``add_pair`` of ``bytes.h``.

Their instruction (``vpmaddubsw``) adds the products of two neighbouring channels in 16 bits, and saturates. It is exact
where the positive weights of the two, and the negative ones, sum up to 128 at most, since 255 * 128 < 2^15. Two blocks
that stay within that together are a pair. A block that is left alone is exact by itself once the signs of two
neighbours differ: where they do not, a weight changes its sign, and its pixels become 255 less themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .calls import row_of_each

_MOST = 128
_ROUNDS = 6  # in which partners are looked for: more find few


class Paired(NamedTuple):
    """What the kernel reads.

    Attributes:
        values: int8 ``(2 * groups, 4)``: two blocks of weights, or one and -1 where its pixels are turned.
        columns: int16, of each; that of a block alone stands twice.
        rows: int32, where each row begins, and the end; then where its blocks begin that are alone.
        constant: int64, of each row, what turned pixels leave to be added.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor
    constant: Tensor


def in_pairs(values: Tensor, columns: Tensor, rows: Tensor) -> Paired:
    """Compressed blocks, of ``compress_bytes``, by twos; the order within a row is another.

    Example:
        >>> values = torch.tensor([[60, 60, 0, 0], [-9, 8, 7, 7], [99, 99, 0, -5]], dtype=torch.int8)
        >>> columns, rows = torch.tensor([0, 1, 2], dtype=torch.int16), torch.tensor([0, 3], dtype=torch.int32)
        >>> paired = in_pairs(values, columns, rows)
        >>> paired.values.tolist()
        [[-9, 8, 7, 7], [60, 60, 0, 0], [99, -99, 0, -5], [0, -1, 0, 0]]
        >>> paired.columns.tolist(), paired.rows.tolist(), paired.constant.tolist()
        ([1, 0, 2, 2], [0, 4, 2], [25245])
    """
    values, columns, row = _without_the_lowest(values, columns, row_of_each(rows, len(values)))
    count, reach = len(rows) - 1, _reach(values)
    pairs, alone = _matched(reach, row, count)
    signed, turned = _turned(values[alone], reach[alone])
    groups = torch.cat([row[pairs[0]] * 2, row[alone] * 2 + 1])
    order = groups.argsort(stable=True)
    starts = torch.zeros(2 * count + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = 2 * torch.bincount(groups, minlength=2 * count).cumsum(0)
    first, second = torch.cat([values[pairs[0]], signed]), torch.cat([values[pairs[1]], turned])
    places = torch.stack([torch.cat([columns[pairs[k]], columns[alone]]) for k in (0, 1)], 1)
    constant = torch.zeros(count, dtype=torch.int64, device=rows.device)
    constant.index_add_(0, row[alone], 255 * (values[alone].long() * turned.bool()).sum(1))
    blocks = torch.stack([first, second], 1)[order].reshape(-1, 4)
    return Paired(blocks, places[order].flatten(), torch.cat([starts[::2], starts[1::2]]), constant)


def _without_the_lowest(values: Tensor, columns: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of neighbours that are both -128, whose signs cannot change, one becomes -127; a block is added for its -1."""
    lowest = (values.view(-1, 2, 2) == -128).all(2)
    some = lowest.any(1)
    rest = torch.zeros_like(values)
    rest[:, 1::2] = -lowest.to(torch.int8)
    return torch.cat([values - rest, rest[some]]), torch.cat([columns, columns[some]]), torch.cat([row, row[some]])


def _reach(values: Tensor) -> Tensor:
    """Of each block the sums of the positive weights of two neighbours, and of the negative ones: ``(blocks, 4)``."""
    two = values.to(torch.int16).view(-1, 2, 2)
    return torch.cat([two.clamp(min=0).sum(2), (-two).clamp(min=0).sum(2)], 1)


def _matched(reach: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs of blocks of a row that fit, ``(2, pairs)``, and the blocks without a partner."""
    left, found = (reach.amax(1) <= _MOST).nonzero()[:, 0], []
    other_left = (reach.amax(1) > _MOST).nonzero()[:, 0]
    for turn in range(_ROUNDS):
        key = reach[left].amax(1) if turn % 2 == 0 else left * 40503 % 997  # the largest with the smallest; at random
        left = left[(row[left] * 1024 + key).argsort(stable=True)]
        counts = torch.bincount(row[left], minlength=rows)
        end = counts.cumsum(0)[row[left]]
        place = torch.arange(len(left), device=left.device)
        mirrored = 2 * end - counts[row[left]] - 1 - place
        partner = left[mirrored]
        fits = ((reach[left] + reach[partner]).amax(1) <= _MOST) & (left != partner)
        once = fits & (place < mirrored)
        found.append(torch.stack([left[once], partner[once]]))
        left = left[~fits]
    return torch.cat(found, 1), torch.cat([left, other_left]).sort().values


def _turned(values: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks with the signs that make them exact, and -1 where the pixels are turned."""
    two = values.view(-1, 2, 2)
    beyond = (reach.view(-1, 2, 2) > _MOST).any(1)  # of each two neighbours
    second = two[:, :, 1] != -128  # its sign can change, otherwise the first one's
    turned = torch.stack([beyond & ~second, beyond & second], 2)
    return torch.where(turned, -two, two).view(-1, 4), -turned.to(torch.int8).view(-1, 4)
