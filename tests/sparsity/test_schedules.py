"""When masks change, and which weights; against brute force."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revnets.sparsity import Schedule, run_flops, step_flops
from revnets.sparsity.schedules import drop, exchanged, grow


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 2**31), st.data())
def test_drop_takes_the_smallest_and_grow_the_largest(active: int, more: int, seed: int, data: st.DataObject) -> None:
    numel = active + more
    count = data.draw(st.integers(0, min(active, more)))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=generator)[:active]] = True
    weight = torch.randn(numel, generator=generator) * mask
    scores = torch.randn(numel, generator=generator).abs()
    kept = drop(weight, mask, count)
    by_magnitude = sorted((i for i in range(numel) if mask[i]), key=lambda i: abs(float(weight[i])))
    assert {i for i in range(numel) if kept[i]} == set(by_magnitude[count:])
    new = grow(kept, scores, count)
    free = sorted((i for i in range(numel) if not kept[i]), key=lambda i: -float(scores[i]))
    assert {i for i in range(numel) if new[i]} == set(by_magnitude[count:]) | set(free[:count])
    assert int(new.sum()) == active


def test_scores_that_are_not_finite() -> None:
    kept = torch.tensor([False, False, False, True])
    scores = torch.tensor([math.nan, 0.5, math.inf, math.inf])
    assert grow(kept, scores, 1).tolist() == [False, False, True, True]
    assert grow(kept, scores, 2).tolist() == [False, True, True, True]


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.0, 1.0, math.nan, math.inf])), min_size=1, max_size=40),
    st.data(),
)
def test_ties_and_zeros_keep_the_counts(places: list[tuple[bool, float]], data: st.DataObject) -> None:
    """Scores that are all 0, equal or NaN: still as many grow as were dropped, and nothing that is there is lost."""
    mask = torch.tensor([active for active, _ in places])
    values = torch.tensor([value for _, value in places])
    active, free = int(mask.sum()), int((~mask).sum())
    count = data.draw(st.integers(0, free))
    new = grow(mask, values, count)
    assert int(new.sum()) == active + count
    assert bool((new | ~mask).all())
    taken = data.draw(st.integers(0, active))
    left = drop(torch.nan_to_num(values, nan=0.0), mask, taken)
    assert int(left.sum()) == active - taken
    assert bool((mask | ~left).all())


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0, 1))
def test_exchanged_never_exceeds_what_there_is(active: int, free: int, fraction: float) -> None:
    count = exchanged(active, active + free, fraction)
    assert 0 <= count <= min(active, free)
    assert count == min(math.floor(active * fraction), free)


@given(st.integers(1, 500), st.integers(1, 60), st.floats(0, 0.9), st.floats(0.01, 1))
def test_number_of_updates(total: int, interval: int, start: float, length: float) -> None:
    end = min(start + length, 1.0)
    schedule = Schedule("rigl", total, interval, start, end)
    due = [t for t in range(1, total + 1) if schedule.due(t)]
    for t in (0, total // 3, total):
        assert schedule.updates(t) == len([d for d in due if d <= t])
    assert all(round(start * total) < t < round(end * total) for t in due)
    assert all(b - a == interval for a, b in pairwise(due))
    fractions = [schedule.fraction(t) for t in due]
    assert fractions == sorted(fractions, reverse=True)
    assert all(0 <= f <= 0.3 for f in fractions)


def test_cosine() -> None:
    schedule = Schedule("set", 1000, end=0.5, drop_fraction=0.4)
    for t in (0, 100, 250, 499):
        assert schedule.fraction(t) == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * t / 500)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"start": 0.8}, "end=0.75.*before they start.*start=0.8"),
        ({"end": 0.0}, "end=0.0.*before they start"),
        ({"end": 1.5}, "end=1.5.*0 to 1"),
        ({"interval": 0}, "interval=0"),
        ({"drop_fraction": 0.0}, "drop_fraction=0.0"),
        ({"drop_fraction": 1.2}, "drop_fraction=1.2"),
        ({"name": "magic"}, "static, set, rigl"),
        ({"total_steps": None}, "total_steps"),
        ({"total_steps": 0}, "total_steps=0"),
    ],
)
def test_mistakes(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(**{"name": "rigl", "total_steps": 100, **values})  # type: ignore[arg-type]


def test_flops_of_a_step() -> None:
    assert step_flops("dense", 1000, 1000) == 3000
    assert step_flops("static", 1000, 250) == step_flops("set", 1000, 250) == 3 * 1000 * 0.25
    assert step_flops("rigl", 1000, 250, interval=100) == pytest.approx((3 * 250 * 100 + 2 * 250 + 1000) / 101)
    with pytest.raises(ValueError, match="dense, static, set, rigl"):
        step_flops("magic", 1, 1)


@given(st.sampled_from(["static", "set", "rigl"]), st.integers(1, 300), st.integers(1, 40))
def test_flops_of_a_run_are_the_sum_of_its_steps(name: str, steps: int, interval: int) -> None:
    schedule = Schedule(name, 300, interval)
    expected = sum(2 * 25 + 100 if name == "rigl" and schedule.due(t) else 3 * 25 for t in range(1, steps + 1))
    assert run_flops(schedule, 100, 25, steps) == expected
