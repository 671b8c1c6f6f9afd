"""Functions timed by turns: medians over rounds in each of which every one is called."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .memory import call, synchronize

Step = Callable[[], Any]


def clock(device: torch.device) -> Callable[[], float]:
    """What times a step on a device: on one thread of a CPU the processor's time, which other work does not move.

    Args:
        device: where the step runs; call ``synchronize`` before each look.

    Example:
        >>> now = clock(torch.device("cpu"))
        >>> now() <= now()
        True
    """
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def second_of_two(model: nn.Module, x: Any, loss_fn: Callable[[Any], Tensor], device: torch.device) -> float:
    """Seconds (see ``clock``) of the second of two steps in a row: the first finds memory as others have left it.

    Args:
        model: in training; it is left without gradients.
        x: its input.
        loss_fn: from its output to a scalar.
        device: where it runs.

    Example:
        >>> second_of_two(nn.Linear(2, 2), torch.ones(1, 2), torch.sum, torch.device("cpu")) > 0
        True
    """
    now, seconds = clock(device), 0.0
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        synchronize(device)
        start = now()
        loss_fn(call(model, x)).backward()
        synchronize(device)
        seconds = now() - start
    model.zero_grad(set_to_none=True)
    return seconds


def medians(
    steps: Sequence[Step],
    repeats: int,
    warm: float = 0.0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[tuple[float, float]]:
    """Median wall time, and time of the processor, of each step on the CPU.

    Args:
        steps: what to call.
        repeats: rounds.
        warm: seconds for which a step is called, once at least, before it is timed: threads of the one before go on
            spinning, on this one's cores.
        progress: wraps the rounds.

    Example:
        >>> len(medians([lambda: None, lambda: None], 3))
        2
    """
    taken = rounds(steps, repeats, warm, progress)
    return [(statistics.median(w for w, _ in found), statistics.median(c for _, c in found)) for found in taken]


def rounds(
    steps: Sequence[Step],
    repeats: int,
    warm: float = 0.0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[list[tuple[float, float]]]:
    """Wall time and time of the processor of each step in each round; arguments as of ``medians``.

    Example:
        >>> [len(found) for found in rounds([lambda: None, lambda: None], 3)]
        [3, 3]
    """
    taken: list[list[tuple[float, float]]] = [[] for _ in steps]
    for _ in progress(range(repeats)):
        for step, found in zip(steps, taken, strict=True):
            end = time.perf_counter() + warm
            step()
            while time.perf_counter() < end:
                step()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return taken


def milliseconds(steps: Mapping[str, Step], device: torch.device, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median time of each step on a device.

    Args:
        steps: by name.
        device: where they run: CUDA events measure there, the clock elsewhere.
        rounds: that count.
        warmup: rounds that do not.

    Example:
        >>> sorted(milliseconds({"a": lambda: None, "b": lambda: None}, torch.device("cpu"), 3))
        ['a', 'b']
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warmup + rounds):
        for name, step in steps.items():
            taken[name].append(_once(step, device))
    return {name: statistics.median(times[warmup:]) for name, times in taken.items()}


def _once(step: Step, device: torch.device) -> float:
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end))
