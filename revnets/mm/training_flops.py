"""FLOPs of a training with MMEngine's runner, for images of the size of its first batch."""

from __future__ import annotations

from typing import Any

from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from ..layers.accounting import count_costs
from ..layers.trace import TraceError
from ..layers.training_flops import FlopsReport, TrainingFlops, by_schedule, training_flops
from ..profiling.fake import ProfileError
from ..sparsity import SparsityController


class RunFlops:
    """Counts what a run costs, by the schedule of its masks and with what is recomputed; theoretical.

    Detectors with a dense head and, where they have one, mmdet's ``StandardRoIHead`` are counted whole (the regions
    that training samples included); other models as their ``mode="tensor"`` runs.

    Args:
        runner: of the training, before its first iteration.
        controller: of the masks.
    """

    def __init__(self, runner: Any, controller: SparsityController) -> None:
        self.controller = controller
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
            total = self.step.run(self.controller.schedule, self.controller.steps)
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
        """Log the FLOPs of the run, and hand them on as ``train_flops`` in the message hub; None where uncounted."""
        if self.step is None:
            return None
        steps = self.controller.steps
        total, recomputed = self.step.run(self.controller.schedule, steps), self.step.recomputed * steps
        runner.message_hub.update_info("train_flops", total)
        runner.message_hub.update_info("train_flops_recomputed", recomputed)
        runner.logger.info(
            f"training FLOPs, by schedule, of {steps} steps of {self.unit}: {total:.4g}, "
            f"of which {recomputed:.4g} recomputed"
        )
        training = by_schedule(self.step, self.controller.schedule, steps)
        return FlopsReport(self.costs, training, f"run of {steps} steps of {self.unit}")


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
    from .detectors import FixedStep

    return FixedStep(model, "detector")
