"""Blocks by twos: the same products, none of whose sums leaves 16 bits, whatever the pixels."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.kernels.byte_blocks import compress_bytes
from revnets.kernels.byte_pairs import Paired, in_pairs


def saturated(pixels: Tensor, weights: Tensor) -> Tensor:
    """``vpmaddubsw``, of bytes ``(..., 4)``: two sums, int64; and whether it would saturate."""
    sums = (pixels.long() * weights.long()).unflatten(-1, (2, 2)).sum(-1)
    assert bool((sums.abs() < 2**15).all()), f"a sum of {int(sums.abs().max())} is saturated"
    return sums


def multiplied(paired: Paired, pixels: Tensor) -> Tensor:
    """Each row's sum, int64, with pixels ``(lines, 4)``, as ``add_pair`` and ``add_one`` of bytes.h compute it."""
    count = len(paired.constant)
    sums = paired.constant.clone()
    for row, alone in enumerate(paired.rows[count + 1 :].tolist()):
        begin, end = paired.rows[row : row + 2].tolist()
        assert begin <= alone <= end
        for at in range(begin, end, 2):
            first, second = paired.values[at : at + 2]
            x = pixels[paired.columns[at : at + 2].long()]
            if at < alone:
                together = saturated(x[0], first) + saturated(x[1], second)
                assert bool((together.abs() < 2**15).all()), "a pair leaves 16 bits"
                sums[row] += together.sum()
            else:
                assert set(second.unique().tolist()) <= {0, -1}
                sums[row] += saturated(x[0] ^ second.view(torch.uint8), first).sum()
    return sums


def check(dense: Tensor, pixels: Tensor) -> Paired:
    """``dense`` is int8 ``(rows, 4 * lines)``, pixels ``(some, lines, 4)``."""
    values, columns, rows = compress_bytes(dense[:, :, None, None])
    paired = in_pairs(values, columns, rows)
    for some in pixels:
        expected = dense.long() @ some.flatten().long()
        assert torch.equal(multiplied(paired, some)[: len(dense)], expected)
    assert not bool(multiplied(paired, torch.zeros_like(pixels[0]))[len(dense) :].any())
    return paired


EXTREMES = torch.tensor([-128, -127, -1, 0, 1, 127], dtype=torch.int8)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    lines=st.integers(1, 9),
    size=st.sampled_from([3, 40, 127, 128]),
    sparsity=st.sampled_from([0.0, 0.6, 1.0]),
    extreme=st.booleans(),
    seed=st.integers(0, 999),
)
def test_products_are_exact(rows: int, lines: int, size: int, sparsity: float, extreme: bool, seed: int) -> None:
    """Also of pixels that drive every sum to its ends: 255 where weights are positive, where they are negative."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(-size, min(size, 127) + 1, (rows, 4 * lines), generator=generator).to(torch.int8)
    if extreme:
        dense = EXTREMES[torch.randint(0, len(EXTREMES), dense.shape, generator=generator)]
    dense = dense.masked_fill(torch.rand(rows, lines, generator=generator).repeat_interleave(4, 1) < sparsity, 0)
    pixels = [torch.randint(0, 256, (lines, 4), generator=generator), torch.full((lines, 4), 255)]
    for row in dense:
        pixels += [255 * (row.view(lines, 4) > 0), 255 * (row.view(lines, 4) < 0)]
    check(dense, torch.stack([one.to(torch.uint8) for one in pixels]))


def test_every_two_neighbours() -> None:
    """All pairs of extreme weights, beside all others, with all extreme pixels."""
    two = torch.tensor(list(itertools.product(EXTREMES.tolist(), repeat=2)), dtype=torch.int8)
    dense = torch.cat([two.repeat_interleave(len(two), 0), two.repeat(len(two), 1)], 1)
    pixels = torch.tensor(list(itertools.product([0, 255], repeat=4)), dtype=torch.uint8)[:, None]
    check(dense, pixels)


@pytest.mark.parametrize(("size", "share"), [(20, 1.0), (127, 0.0)])
def test_how_many_find_a_partner(size: int, share: float) -> None:
    """Small weights all do; of large ones with the same sign none."""
    generator: Any = torch.Generator().manual_seed(0)
    dense = torch.randint(size - 5, size + 1, (6, 64), generator=generator).to(torch.int8)
    paired = check(dense, torch.full((1, 16, 4), 255, dtype=torch.uint8))
    of_pairs = (paired.rows[len(paired.constant) + 1 :] - paired.rows[: len(paired.constant)]).sum()
    assert float(of_pairs) == share * (6 * 16 if share else 1)
