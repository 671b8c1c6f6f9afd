"""What a run changes, in one place: checkpoints hold it, and a resumed run gets it back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from revnets.sparsity import SparsityController
from revnets.training.guards.finite import FiniteGuard


@dataclasses.dataclass(kw_only=True)
class State:
    """All that a checkpoint holds besides numbers and words; what a run does not have is None."""

    model: nn.Module  # wrapped under torchrun, once the run goes on from its checkpoint
    optimizer: torch.optim.Optimizer
    scheduler: Any = None  # timm's
    scaler: NativeScaler | None = None  # of the loss, in float16
    ema: ModelEmaV3 | None = None  # the running mean of the weights
    sparsity: SparsityController | None = None  # where there are sparse layers
    guard: FiniteGuard | None = None  # counts updates that are left out

    @property
    def plain(self) -> nn.Module:
        """The model, not wrapped."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Those with weights and statistics, under their names in checkpoints: the model, and the mean of it."""
        return {"model": self.plain, **({} if self.ema is None else {"ema": self.ema.module})}
