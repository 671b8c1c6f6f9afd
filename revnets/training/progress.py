"""Progress over the steps of an epoch, and times in words."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_logger = logging.getLogger("revnets")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Steps:
    """Progress over the steps of an epoch: a bar in a terminal, else a line of the log now and then.

    Args:
        title: Such as `train 3`.
        total: Number of steps.
        every: Steps between two lines of the log.
        shown: Only one of several processes shows it.
    """

    def __init__(self, title: str, total: int, every: int, shown: bool) -> None:
        self.title, self.total, self.every = title, total, every
        self._start = time.perf_counter()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        self._lines = shown and not console.is_terminal
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True)
            self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def due(self, step: int) -> bool:
        """Whether this step (from 1) is one to report on."""
        return step % self.every == 0 or step == self.total

    def show(self, step: int, note: str) -> None:
        """Reports on the steps done so far.

        Args:
            step: How many are done.
            note: What else to say.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif self._lines:
            rest = (time.perf_counter() - self._start) / step * (self.total - step)
            share = 100 * step / self.total
            _logger.info(f"{self.title} {step}/{self.total} ({share:.0f}%) ETA {clock(rest)} {note}")
