"""Functions timed by turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from revnets.profiling.turns import medians, milliseconds


def steps(order: list[str]) -> dict[str, Callable[[], None]]:
    return {name: lambda name=name: order.append(name) for name in "ab"}  # type: ignore[misc]


def test_steps_take_turns() -> None:
    order: list[str] = []
    assert set(milliseconds(steps(order), torch.device("cpu"), rounds=2, warmup=1)) == {"a", "b"}
    assert order == list("ababab")


def test_each_is_called_before_it_is_timed() -> None:
    order: list[str] = []
    assert len(medians(list(steps(order).values()), 2)) == 2
    assert order == list("aabbaabb")
    order.clear()
    medians(list(steps(order).values()), 1, warm=0.01)
    assert order.count("a") > 2


def test_medians_of_both_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"wall": 0.0, "cpu": 0.0}
    lasting = iter([9, 1, 9, 5, 9, 3])  # every other call is not timed

    def step() -> None:
        now["wall"] += (seconds := next(lasting))
        now["cpu"] += seconds / 4

    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["cpu"])
    assert medians([step], 3) == [(3, 0.75)]


def test_rounds_are_shown() -> None:
    rounds: list[int] = []
    medians([lambda: None], 3, progress=lambda every: (rounds.append(n) or n for n in every))
    assert rounds == [0, 1, 2]
