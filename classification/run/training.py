"""A run that trains: its state, and what changes it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from revnets.numerics import NumericsMonitor
from revnets.training.capture.step import TrainingStep
from revnets.training.guards.drift import DriftMonitor
from revnets.training.guards.finite import FiniteGuard

from ..images.data import TrainData
from ..options import TrainOptions
from ..runtime import Runtime
from .recovery import Position, Recovery
from .state import State


@dataclasses.dataclass(kw_only=True)
class Training(State):
    """A run: its state, and what changes it."""

    options: TrainOptions
    runtime: Runtime
    loss: nn.Module
    data: TrainData
    recovery: Recovery
    guard: FiniteGuard
    drift: DriftMonitor
    validation: Any = None  # loader of the images to validate on
    epochs: int = 0  # of the whole schedule
    numerics: NumericsMonitor | None = None  # where --numerics-interval asks for it
    step: TrainingStep | None = None  # with --cuda-graph, once there was a batch
    task: Any = None  # timm's training task around the model, where a teacher takes part

    @property
    def updates_per_epoch(self) -> int:
        """Updates of the weights in an epoch."""
        return -(-len(self.data.loader) // self.options.grad_accum_steps)

    def updates_before(self, position: Position) -> int:
        """Updates of the weights from the start of the run."""
        return position.epoch * self.updates_per_epoch + -(-position.step // self.options.grad_accum_steps)
