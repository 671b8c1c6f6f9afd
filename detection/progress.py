"""What a run tells while it goes on: progress within an epoch, one line per epoch, the figures of each validation."""

from __future__ import annotations

import logging
import time
from typing import Any

from mmengine.hooks import Hook

from revnets.training.progress import Steps, clock

from .report import metric_words

_logger = logging.getLogger("detection")
VALIDATIONS = "validations"


class Progress(Hook):
    """Reports training, validation and test, in a terminal as a bar, else as a line now and then.

    Args:
        every: Iterations between two lines.
        shown: Only one of several processes shows it.
    """

    priority = "LOW"  # before checkpoints are saved, which take the list of validations with them

    def __init__(self, every: int, shown: bool) -> None:
        self.every, self.shown = every, shown
        self.validations: list[dict[str, float]] = []  # of a resumed run's earlier part, too
        self.seconds = 0.0
        self._steps: Steps | None = None
        self._first = 0

    def before_train(self, runner: Any) -> None:
        """Starts the clock."""
        self._start, self._first = time.perf_counter(), runner.iter
        self.validations = list(runner.message_hub.runtime_info.get(VALIDATIONS, []))

    def after_train(self, runner: Any) -> None:
        """Stops it."""
        self.seconds = time.perf_counter() - self._start

    def before_train_epoch(self, runner: Any) -> None:
        """A new bar."""
        self._begin(f"train {runner.epoch + 1}", len(runner.train_dataloader))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Losses, learning rate, time left of the run."""
        if self._steps is None or not self._steps.due(batch_idx + 1):
            return
        losses = {key: float(value) for key, value in (outputs or {}).items() if "loss" in key}
        lr = runner.optim_wrapper.get_lr()
        done = runner.iter + 1 - self._first
        rest = (time.perf_counter() - self._start) / done * (runner.max_iters - runner.iter - 1)
        words = ", ".join(f"{key} {value:.3f}" for key, value in losses.items())
        self._steps.show(batch_idx + 1, f"{words}, lr {next(iter(lr.values()))[0]:.2e}, whole run ETA {clock(rest)}")

    def after_train_epoch(self, runner: Any) -> None:
        """The bar goes."""
        self._end()

    def before_val_epoch(self, runner: Any) -> None:
        """A new bar."""
        self._begin("validate", len(runner.val_dataloader))

    def before_test_epoch(self, runner: Any) -> None:
        """A new bar."""
        self._begin("test", len(runner.test_dataloader))

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Images done."""
        if self._steps is not None and self._steps.due(batch_idx + 1):
            self._steps.show(batch_idx + 1, "")

    after_test_iter = after_val_iter

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """The figures."""
        self._end()
        row = {"epoch": runner.epoch, "iter": runner.iter, **(metrics or {})}
        self.validations.append({key: float(value) for key, value in row.items()})
        runner.message_hub.update_info(VALIDATIONS, list(self.validations))
        if self.shown:
            _logger.info(
                f"epoch {runner.epoch} of {runner.max_epochs}: {metric_words(metrics or {}) or 'nothing found'}"
            )

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """The bar goes."""
        self._end()

    def _begin(self, title: str, total: int) -> None:
        self._steps = Steps(title, total, self.every, self.shown)
        self._steps.__enter__()

    def _end(self) -> None:
        if self._steps is not None:
            self._steps.__exit__(None, None, None)
            self._steps = None
