"""Masks are exact, and distributions share out a sparsity as their papers say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revnets.sparsity import masks

shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
)
sparsities = st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.9]), st.floats(0, 0.99))


@given(shapes, sparsities, st.integers(0, 99))
def test_random_masks_have_exactly_the_count(shape: tuple[int, ...], sparsity: float, seed: int) -> None:
    mask = masks.random_mask(shape, sparsity, torch.Generator().manual_seed(seed))
    assert mask.dtype == torch.bool
    assert mask.shape == shape
    assert int(mask.sum()) == round((1 - sparsity) * math.prod(shape))
    again = masks.random_mask(shape, sparsity, torch.Generator().manual_seed(seed))
    assert torch.equal(mask, again)


def test_random_masks_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([masks.random_mask((5, 6), 0.7, generator) for _ in range(4000)]).double().mean(0)
    assert (mean - 0.3).abs().max() < 4.5 * math.sqrt(0.3 * 0.7 / 4000)


@given(st.lists(shapes, min_size=1, max_size=8), sparsities, st.sampled_from(sorted(masks.DISTRIBUTIONS)))
def test_totals_are_exact(layers: list[tuple[int, ...]], sparsity: float, distribution: str) -> None:
    densities = masks.densities(layers, sparsity, distribution)
    counts = [d * math.prod(shape) for d, shape in zip(densities, layers, strict=True)]
    assert all(0 <= d <= 1 for d in densities)
    assert all(abs(c - round(c)) < 1e-6 for c in counts)
    assert sum(map(round, counts)) == round((1 - sparsity) * sum(map(math.prod, layers)))


@given(st.lists(shapes, min_size=2, max_size=8), st.floats(0.5, 0.999), st.sampled_from(sorted(masks.DISTRIBUTIONS)))
def test_no_layer_is_left_without_weights(layers: list[tuple[int, ...]], sparsity: float, distribution: str) -> None:
    """It would never learn: where the budget has one for each, each has one, and the total stays exact."""
    sizes = [math.prod(shape) for shape in layers]
    densities = masks.densities(layers, sparsity, distribution)
    counts = [round(d * size) for d, size in zip(densities, sizes, strict=True)]
    budget = round((1 - sparsity) * sum(sizes))
    assert sum(counts) == budget
    assert sum(count > 0 for count in counts) == min(budget, len(layers))


def bisected(layers: Sequence[tuple[int, ...]], raw: Sequence[float], sparsity: float) -> list[float]:
    """The definition the other way round: the factor for which ``min(1, factor * raw)`` meets the budget."""
    sizes = [math.prod(shape) for shape in layers]
    budget = round((1 - sparsity) * sum(sizes))
    low, high = 0.0, 2 / min(raw)
    for _ in range(200):
        factor = (low + high) / 2
        total = sum(min(1.0, factor * r) * n for r, n in zip(raw, sizes, strict=True))
        low, high = (factor, high) if total < budget else (low, factor)
    return [min(1.0, high * r) for r in raw]


@given(st.lists(shapes, min_size=1, max_size=8), sparsities, st.sampled_from([0.5, 1.0, 2.0]))
def test_erk_and_er_equal_their_definition(layers: list[tuple[int, ...]], sparsity: float, power: float) -> None:
    for name, used in (("erk", layers), ("er", [shape[:2] for shape in layers])):
        raw = [(sum(shape) / math.prod(shape)) ** power for shape in used]
        expected = bisected(layers, raw, sparsity)
        got = masks.DISTRIBUTIONS[name](layers, sparsity, power)
        kept_alive = sum(b * math.prod(shape) < 1 for shape, b in zip(layers, expected, strict=True))
        for shape, a, b in zip(layers, got, expected, strict=True):  # whole weights, less those that keep a layer alive
            assert abs(a - b) * math.prod(shape) < 1 + kept_alive + 1e-6


@pytest.mark.parametrize("distribution", sorted(masks.DISTRIBUTIONS))
def test_one_layer_among_large_ones_keeps_a_weight(distribution: str) -> None:
    layers = [(1, 2), (100, 100), (1, 1), (200, 50)]
    densities = masks.densities(layers, 0.99, distribution)
    counts = [round(d * math.prod(shape)) for d, shape in zip(densities, layers, strict=True)]
    assert min(counts) >= 1
    assert sum(counts) == round(0.01 * 20003)


def test_power_0_is_uniform() -> None:
    layers = [(16, 3, 3, 3), (32, 16, 3, 3), (10, 32)]
    assert masks.erk(layers, 0.8, power=0) == masks.uniform(layers, 0.8)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan"), True, "0.5"])
def test_sparsity_out_of_range(sparsity: object) -> None:
    with pytest.raises(ValueError, match="sparsity="):
        masks.random_mask((2, 2), sparsity)  # type: ignore[arg-type]


def test_unknown_distribution() -> None:
    with pytest.raises(ValueError, match="uniform, er, erk"):
        masks.densities([(2, 2)], 0.5, "gaussian")
