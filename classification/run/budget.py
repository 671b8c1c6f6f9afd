"""A training within a budget of bytes (`--memory-budget`): what each block of the network keeps."""

from __future__ import annotations

import logging

import torch
from torch import nn

from revnets.budget import fit
from revnets.training.errors import UserError, one_line

from ..options import TrainOptions
from ..runtime import Runtime

_logger = logging.getLogger("classification")


def fit_memory(
    options: TrainOptions,
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: tuple[int, ...],
) -> None:
    """Has the blocks of the network keep so little that a step takes no more than `--memory-budget`.

    Averaged weights, a teacher, and images that wait on the device come on top.

    Args:
        options: All options.
        runtime: Device and precision.
        model: Not wrapped, on its device; its blocks change in place.
        optimizer: Of the model.
        images: Channels, height and width.

    Raises:
        UserError: Not a size, or the least possible is more, or the network cannot be planned.
    """
    if not options.memory_budget:
        return
    try:
        plan = fit(model, images, options.batch_size, options.memory_budget, runtime.amp_dtype, optimizer)
    except ValueError as error:
        raise UserError(f"--memory-budget: {one_line(error)}.") from error
    _logger.info(f"--memory-budget {options.memory_budget}:\n{plan}")
