"""FLOPs of a training with MMEngine's runner, for images of the size of its first batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ...layers.accounting import count_costs
from ...layers.trace import TraceError
from ...profiling.fake import ProfileError
from ...profiling.training_flops import FlopsReport, TrainingFlops, by_schedule, training_flops
from ...sparsity import Schedule

FLOPS = ("train_flops", "train_flops_recomputed", "train_flops_all_phases")
"""What ``RunFlops`` leaves in the message hub."""


class RunFlops:
    """Counts what a run costs, by the schedule of its masks and with what is recomputed; theoretical.

    Detectors with a dense head and, where they have one, mmdet's ``StandardRoIHead`` are counted whole (the regions
    that training samples included); other models as their ``mode="tensor"`` runs.

    Args:
        runner: of the training, before its first iteration.
        schedule: of the masks; ``static`` where there are none.
        steps: how many updates of the weights are done.
    """

    def __init__(self, runner: Any, schedule: Schedule, steps: Callable[[], int]) -> None:
        self.schedule, self.steps = schedule, steps
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.unit = ""
        self.step: TrainingFlops | None = None
        self._shape: tuple[int, ...] | None = None
        self._images = runner.world_size * getattr(runner.optim_wrapper, "_accumulative_counts", 1)
        self._watch = self.model.data_preprocessor.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, batch: Any) -> None:
        inputs = batch.get("inputs") if isinstance(batch, dict) else None
        if isinstance(inputs, Tensor):
            self._shape = tuple(inputs.shape)
        self._watch.remove()

    def tell(self, runner: Any) -> None:
        """Put the TFLOPs of the run so far among the scalars of the log."""
        if self._shape is not None:
            self._count(runner, self._shape)
            self._shape = None
        if self.step is not None:
            total = self.step.run(self.schedule, self.steps())
            runner.message_hub.update_scalar("train/train_tflops", total / 1e12)

    def _count(self, runner: Any, shape: tuple[int, ...]) -> None:
        images = shape[0] * self._images
        try:
            network = counted(self.model)
            self.costs = count_costs(network, shape[1:])
        except (ProfileError, TraceError) as error:
            runner.logger.info(f"no training FLOPs: {error}")
            return
        self.step = training_flops(network, self.costs, images)
        self.unit = f"{images} images {'x'.join(map(str, shape[1:]))}"

    def finish(self, runner: Any) -> FlopsReport | None:
        """Log the FLOPs of the run, and hand them on in the message hub under ``FLOPS``; None where uncounted.

        Those of all phases are there where the model's backbone knows of earlier ones.
        """
        if self.step is None:
            return None
        steps, before = self.steps(), flops_before(self.model)
        total, recomputed = self.step.run(self.schedule, steps), self.step.recomputed * steps
        found = (total, recomputed, *([before + total] if before else []))
        for name, value in zip(FLOPS, found, strict=False):
            runner.message_hub.update_info(name, value)
        phases = f"; with the {before:.4g} of what it started from: {before + total:.4g}" if before else ""
        runner.logger.info(
            f"training FLOPs, by schedule, of {steps} steps of {self.unit}: {total:.4g}, "
            f"of which {recomputed:.4g} recomputed{phases}"
        )
        training = by_schedule(self.step, self.schedule, steps)
        return FlopsReport(self.costs, training, f"run of {steps} steps of {self.unit}")


def flops_before(model: nn.Module) -> float:
    """FLOPs of the trainings that the model's backbones come from, as far as their checkpoints know."""
    return float(sum(vars(module).get("flops_before", 0.0) for module in model.modules()))


@HOOKS.register_module()
class TrainingFlopsHook(Hook):
    """Counts the FLOPs of a dense fine-tuning whose backbone comes from a training that counted its own.

    Both phases together are in the message hub and the log at the end, see ``RunFlops``. It leaves other runs alone,
    and those with a ``SparsityHook``, which counts by itself.

    Example:
        >>> TrainingFlopsHook().priority  # in a config: custom_hooks=[dict(type="TrainingFlopsHook")]
        'NORMAL'
    """

    priority = "NORMAL"

    def __init__(self) -> None:
        self._steps = 0
        self._flops: RunFlops | None = None

    def before_train(self, runner: Any) -> None:
        """Start counting, where there is an earlier phase and nothing else counts."""
        counts = any(type(hook).__name__ == "SparsityHook" for hook in runner.hooks)
        if runner.rank != 0 or counts or not flops_before(runner.model):
            return
        self._steps = runner.iter // getattr(runner.optim_wrapper, "_accumulative_counts", 1)
        self._flops = RunFlops(runner, Schedule("static"), lambda: self._steps)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Count an update of the weights."""
        if self._flops is not None:
            self._steps += runner.optim_wrapper.should_update()
            self._flops.tell(runner)

    def after_train(self, runner: Any) -> None:
        """Hand on the FLOPs."""
        if self._flops is not None:
            self._flops.finish(runner)


def counted(model: Any) -> nn.Module:
    """The forward pass of training as a module of one argument, whose shapes depend on no value.

    Args:
        model: an MMEngine model; a detector of MMDetection, or any other.

    Raises:
        ProfileError: for a detector with heads of unknown work.
    """
    heads = [getattr(model, name, None) for name in ("bbox_head", "rpn_head", "roi_head")]
    if not any(isinstance(head, nn.Module) for head in heads):
        return model
    from ..detectors import FixedStep

    return FixedStep(model, "detector")
