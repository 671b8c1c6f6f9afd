"""Numerics of layers under MMEngine's runner: ``custom_hooks=[dict(type="NumericsHook", interval=500)]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ...numerics import NumericsMonitor


@HOOKS.register_module()
class NumericsHook(Hook):
    """Watches every linear layer and convolution in some iterations; see ``revnets.numerics.NumericsMonitor``.

    ``numerics.csv`` and ``numerics.png`` in the folder of the run are rewritten after every iteration watched.

    Args:
        interval: iterations between two that are watched; the first one is.
        grad_scale: before the cast of gradients, for layers that have none of their own.

    Raises:
        ValueError: when the training starts, for an interval below 1 or a model without such layers.

    Example:
        >>> NumericsHook(interval=500).interval
        500
    """

    priority = "LOWEST"

    def __init__(self, interval: int = 500, grad_scale: float = 1.0) -> None:
        self.interval, self.grad_scale = interval, grad_scale
        self.monitor: NumericsMonitor | None = None

    def before_train(self, runner: Any) -> None:
        """Start watching, in the process that writes files."""
        if runner.rank == 0:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            self.monitor = NumericsMonitor(model, self.interval, self.grad_scale)
            self.monitor.resume(Path(runner.work_dir), runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Count the iteration, and write where it was watched."""
        if self.monitor is not None and self.monitor.step():
            self.monitor.save(Path(runner.work_dir), type(self.monitor.model).__name__)

    def after_train(self, runner: Any) -> None:
        """Stop watching."""
        if self.monitor is not None:
            self.monitor.close()
