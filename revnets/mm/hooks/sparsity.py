"""Sparse layers under MMEngine's runner: ``custom_hooks=[dict(type="SparsityHook", schedule="rigl")]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from ...sparsity import SparsityController, apply_masks
from ...training.capture.graphed import GraphedPart
from ...training.checkpoints.reading import CheckpointError
from ...training.mask_report import draw_picture, write_table
from .training_flops import RunFlops


@HOOKS.register_module()
class SparsityHook(Hook):
    """Calls a ``SparsityController`` after every update of the weights, and keeps it in the checkpoints.

    Accumulated iterations count as one; those that a loss scaler skips do not. The average of an ``EMAHook`` keeps the
    masks. ``sparsity.csv`` and ``sparsity.png`` are written into the folder of the run, and ``flops.csv``,
    ``flops.json`` and ``flops.png`` where the network can be traced: FLOPs by layer, and of training by schedule, for
    images of the first batch's size. The scalar ``train_tflops`` in the log is that of the run so far.

    Args:
        schedule: ``static``, ``set`` or ``rigl``.
        options: further ones of ``SparsityController``: ``interval``, ``start``, ``end``, ``drop_fraction``,
            ``distribution``, ``sparsity``, ``seed``.

    Raises:
        ValueError: when the run starts, for a model without sparse layers or options that make no schedule.

    Example:
        >>> SparsityHook("rigl", interval=100).schedule
        'rigl'
    """

    priority = "ABOVE_NORMAL"  # before EMAHook, which then averages the masked weights

    def __init__(self, schedule: str = "rigl", **options: Any) -> None:
        self.schedule, self.options = schedule, options
        self.controller: SparsityController | None = None
        self._state: dict[str, Any] | None = None
        self._flops: RunFlops | None = None

    def before_run(self, runner: Any) -> None:
        """Make the controller, unless the run only validates or tests."""
        wrapper = runner.optim_wrapper
        if wrapper is None or isinstance(wrapper, dict):
            return
        optimizer = getattr(wrapper, "optimizer", None)
        if optimizer is None:
            raise ValueError("SparsityHook: one optimizer was expected, not several (OptimWrapperDict)")
        graphed = [
            name for name, m in runner.model.named_modules() if isinstance(getattr(m, "graphs", None), GraphedPart)
        ]
        if graphed and self.schedule != "static":
            raise ValueError(
                f"SparsityHook: schedule {self.schedule!r} changes masks between the steps that a CUDA graph repeats: "
                f"leave cuda_graph of {graphed[0]} out, or use 'static'"
            )
        steps = -(-runner.max_iters // getattr(wrapper, "_accumulative_counts", 1))
        self.controller = SparsityController(runner.model, optimizer, self.schedule, total_steps=steps, **self.options)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the controller's state until the model has its own.

        Raises:
            CheckpointError: when a run is resumed from a checkpoint without one.
        """
        if runner._resume and self.controller is not None:
            if "sparsity" not in checkpoint:
                raise CheckpointError(
                    f"SparsityHook: '{runner._load_from}' says nothing of the schedule of its masks; start from its "
                    "weights with load_from= and resume=False instead"
                )
            self._state = checkpoint["sparsity"]

    def before_train(self, runner: Any) -> None:
        """Mask what ``init_weights`` has drawn, or go on where the checkpoint was."""
        apply_masks(runner.model)
        if self.controller is not None and self._state is not None:
            self.controller.load_state_dict(self._state)
        self._state = None
        self._mask_averages(runner)
        if self.controller is not None and runner.rank == 0:
            controller = self.controller
            self._flops = RunFlops(runner, controller.schedule, lambda: controller.steps)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Mask the average that ``EMAHook`` updated after the last iteration."""
        self._mask_averages(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Mask, and change the masks where it is time."""
        if self.controller is not None and runner.optim_wrapper.should_update():
            update = self.controller.step()
            if update is not None:
                runner.logger.info(str(update))
        if self._flops is not None:
            self._flops.tell(runner)

    def before_val_epoch(self, runner: Any) -> None:
        """Mask the average before ``EMAHook`` swaps it in."""
        self._mask_averages(runner)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the controller's state, and write the table."""
        self._mask_averages(runner)
        if self.controller is not None:
            checkpoint["sparsity"] = self.controller.state_dict()
            write_table(self.controller, Path(runner.log_dir))

    def after_train(self, runner: Any) -> None:
        """Write the table and draw the picture."""
        if self.controller is None or runner.rank != 0:
            return
        folder = Path(runner.log_dir)
        write_table(self.controller, folder)
        draw_picture(self.controller, folder, self.schedule)
        if self._flops is not None and (flops := self._flops.finish(runner)) is not None:
            flops.write(folder)
            flops.draw(folder, self.schedule)

    def _mask_averages(self, runner: Any) -> None:
        for hook in runner.hooks:
            average = getattr(hook, "ema_model", None)
            if isinstance(average, nn.Module):
                apply_masks(average, like=hook.src_model)
