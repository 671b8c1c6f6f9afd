"""A training within a budget of bytes under MMEngine's runner: what each block of the network keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from torch import nn

from ...budget.fitting import as_bytes
from ...budget.planner import Planner
from ...budget.step import Step, device_of, make_inputs
from ...profiling.fake import ProfileError
from ...profiling.target import training_loss
from ..detectors import FixedStep


@HOOKS.register_module()
class MemoryBudgetHook(Hook):
    """Has the blocks of the network keep so little that a training step takes no more than a budget.

    It plans before the first iteration (see ``revnets.fit``) for images of one size, the largest that training sees:
    give it, or the pipeline's ``Resize`` says it. Of a detector, backbone, neck and heads are planned at full load (all
    regions that training samples; without the heads where ``revnets profile`` does not know their kind), other models
    as their ``mode="tensor"`` runs.

    Args:
        budget: of bytes, such as ``"8GB"``, for weights, gradients, optimizer state and activations of one process.
        input_size: of one image as the network sees it, ``(3, height, width)``.
        batch_size: of one process; by default the data loader's.

    Raises:
        ValueError: when the training starts, for what cannot be planned or does not fit; says the least possible.

    Example:
        >>> MemoryBudgetHook("8GB", (3, 800, 1344)).budget
        8000000000
    """

    priority = "VERY_LOW"

    def __init__(
        self, budget: str | int, input_size: Sequence[int] | None = None, batch_size: int | None = None
    ) -> None:
        self.budget = as_bytes(budget)
        self.input_size, self.batch_size = input_size, batch_size
        self.plan: Any = None

    def before_train(self, runner: Any) -> None:
        """Plan, and change the network."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        batch_size = self.batch_size or runner.train_dataloader.batch_size
        size = self.input_size or _size_of(runner.cfg)
        if size is None:
            raise ValueError("MemoryBudgetHook: give input_size=(3, height, width) of the largest images")
        self.plan = plan_of(model, size, batch_size, self.budget, runner.optim_wrapper)
        self.plan.apply(model)
        runner.logger.info(f"memory budget of {self.budget:,} bytes:\n{self.plan}")


def plan_of(model: nn.Module, size: Sequence[int], batch_size: int, budget: int, optim_wrapper: Any = None) -> Any:
    """The plan of a model of MMEngine's.

    Args:
        model: not wrapped.
        size: of one image, channels first.
        batch_size: of a step.
        budget: bytes.
        optim_wrapper: of the training: its optimizer's state counts, and autocast.

    Raises:
        ValueError: for what cannot be planned or does not fit.
    """
    x = make_inputs(model, size, batch_size)
    amp = getattr(optim_wrapper, "cast_dtype", None) if isinstance(optim_wrapper, AmpOptimWrapper) else None
    if amp is None and isinstance(optim_wrapper, AmpOptimWrapper):
        amp = torch.float16
    network = _network(model)
    step = Step(network, x, amp, getattr(optim_wrapper, "optimizer", None), training_loss, device_of(model))
    return Planner(step, batch_size, within={name for name, _ in model.named_modules()}).plan(budget)


def _network(model: Any) -> nn.Module:
    """What of a model runs without annotations: a detector's parts, in shapes that depend on no value."""
    if not (hasattr(model, "backbone") and hasattr(model, "train_cfg")):
        network: nn.Module = model
        return network
    try:
        return FixedStep(model, "detector").train()
    except ProfileError:  # of its heads no such step is known
        return FixedStep(model, "backbone + neck").train()


def _size_of(cfg: Any) -> tuple[int, int, int] | None:
    """The size that the training pipeline resizes images to, padded as detectors pad them."""
    found = [t for t in cfg.get("train_pipeline", []) if t.get("type") == "Resize" and t.get("scale")]
    if not found or not isinstance(found[-1]["scale"], (tuple, list)):
        return None
    width, height = (-(-int(side) // 32) * 32 for side in found[-1]["scale"])
    return 3, height, width
