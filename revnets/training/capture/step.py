"""Whole training steps in one CUDA graph: one launch for forward pass, backward pass and update."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..guards.finite import FiniteGuard
from ..options.values import COUNT
from ..processes import several
from .cuda_graph import CaptureError, CudaGraph
from .training_step import Loss, TrainingStep

__all__ = ["CaptureError", "TrainingStep", "capture_step", "has_graphs"]


def capture_step(
    model: nn.Module,
    loss_fn: Loss | None,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    target: Tensor,
    *,
    amp_dtype: torch.dtype | None = None,
    scaler: Any = None,
    clip_grad: float | None = None,
    accumulate: int = 1,
    warmup: int = 3,
    guard: FiniteGuard | None = None,
    fallback: bool = False,
    graph: bool | None = None,
) -> TrainingStep:
    """A training step that a GPU repeats as one CUDA graph: a launch instead of thousands.

    Steps are tried first, on ``x`` and ``target``; afterwards weights, statistics, optimizer and generators are as
    before. The first call is an ordinary step, in which the optimizer makes its state; the second one is captured.
    Random numbers follow the device's generator as in ordinary steps, and learning rates the optimizer's groups. Where
    a device has no graphs, the same step runs eagerly.

    A model that is changed later (moved, frozen, with other layers) must be captured again, and what it or the loss
    does on the host (Python's ``random``, printing) is not repeated.

    Args:
        model: in training mode, on its device; not wrapped for several processes.
        loss_fn: of the model's output and the target; None: cross entropy.
        optimizer: of its weights: SGD, Adam or AdamW of torch, or another one that is ``capturable``.
        x: an input, whose shape, type and memory layout are captured.
        target: of it.
        amp_dtype: of autocast, or None.
        scaler: ``torch.amp.GradScaler``, or None.
        clip_grad: largest norm of all gradients, or None.
        accumulate: parts of equal size that the batch is taken in; their gradients add up.
        warmup: steps that are tried.
        guard: leaves out updates with a loss or gradients that are not finite; the caller starts it, and looks whether
            it is exhausted. None: nobody looks.
        fallback: run batches of another shape, such as an incomplete last one, eagerly instead of refusing them.
        graph: False: never capture, though compute in the same way; None: where the device can.

    Raises:
        ValueError: for what cannot be captured; says what to do.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> x, target = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
        >>> step = capture_step(net, None, torch.optim.SGD(net.parameters(), lr=0.1), x, target)
        >>> losses = [step(x, target).item() for _ in range(3)]
        >>> losses[2] < losses[0], step.settle()
        (True, True)
    """
    COUNT.check("accumulate", accumulate)
    COUNT.check("warmup", warmup)
    _check_model(model, x)
    if len(x) % accumulate:
        raise ValueError(f"accumulate={accumulate}: a batch of {len(x)} has no {accumulate} equal parts")
    step = TrainingStep(model, loss_fn or F.cross_entropy, optimizer, x, target)
    step.amp_dtype, step.scaler, step.clip_grad, step.accumulate = amp_dtype, scaler, clip_grad, accumulate
    step.fallback = fallback
    if has_graphs(x.device):
        watched = scaler is not None or bool(guard and guard.limit)
        step.prepare(CudaGraph(x.device) if graph is not False else None, watched)
    step.warm_up(warmup)
    step.guard = guard if guard is not None and guard.limit else None
    return step


def _check_model(model: nn.Module, x: Tensor) -> None:
    name = type(model).__name__
    if several() or isinstance(model, DistributedDataParallel):
        raise ValueError(
            "several processes exchange gradients within a step, which is not captured: train without capture"
        )
    if not model.training:
        raise ValueError(f"{name} is in eval mode, and training steps are captured: call model.train() first")
    elsewhere = {str(t.device) for t in (*model.parameters(), *model.buffers()) if t.device != x.device}
    if elsewhere:
        raise ValueError(f"{name} has tensors on {', '.join(sorted(elsewhere))}, the input is on {x.device}: move one")


def has_graphs(device: torch.device) -> bool:
    """Whether steps on this device are captured.

    Example:
        >>> has_graphs(torch.device("cpu"))
        False
    """
    return CudaGraph.exists(device)
