"""Predictions of memory in processes of their own, so that the GPU need not wait for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from ..profiling.profile import predict
from ..profiling.target import Setting, Target

_PROCESSES = 6


def peak_bytes(target: Target, setting: Setting) -> int:
    """The predicted peak of a step, everything included."""
    return predict(target, setting).peak_bytes


class Predictions:
    """Predicted peaks, computed as soon as they are known to be wanted.

    Args:
        pool: where; without one, when they are asked for.
    """

    def __init__(self, pool: Executor | None) -> None:
        self._pool = pool
        self._found: dict[tuple[str, str], Future[int]] = {}

    def want(self, target: Target, setting: Setting) -> None:
        """Begin, unless it was begun before."""
        if self._pool is not None and _key(target, setting) not in self._found:
            with suppress(BrokenExecutor):
                self._found[_key(target, setting)] = self._pool.submit(peak_bytes, target, setting)

    def peak(self, target: Target, setting: Setting) -> int:
        """The peak in bytes.

        Raises:
            ProfileError: it cannot be predicted.
        """
        if self._pool is not None:
            self.want(target, setting)
            try:
                return self._found[_key(target, setting)].result()
            except (BrokenExecutor, KeyError):  # one of them was killed, and it does not come back
                self._pool = None
        return peak_bytes(target, setting)

    def want_line(self, target: Target, setting: Setting) -> None:
        """Begin what ``largest`` needs."""
        for count in _PROBES:
            self.want(replace(target, batch_size=count), setting)

    def largest(self, target: Target, setting: Setting, budget: float) -> int:
        """The largest batch within so many bytes, by the line through two predictions; 0 where none fits."""
        low, high = (self.peak(replace(target, batch_size=count), setting) for count in _PROBES)
        slope = max((high - low) / (_PROBES[1] - _PROBES[0]), 1.0)
        return max(0, int(_PROBES[1] + (budget - high) / slope)) if low <= budget else 0


_PROBES = (4, 16)


def _key(target: Target, setting: Setting) -> tuple[str, str]:
    return repr(target), repr(setting)


def _hide_the_gpu() -> None:
    """Predictions need none, and each process that sees it takes half a gigabyte of it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def predicting(device: str, tiny: bool) -> Iterator[Predictions]:
    """Predictions by several processes where a GPU would wait for them, else by this one."""
    count = min(_PROCESSES, max(1, (os.cpu_count() or 2) - 2))
    if device == "cpu" or tiny:
        yield Predictions(None)
        return
    pool: Any = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_hide_the_gpu)
    try:
        yield Predictions(pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
