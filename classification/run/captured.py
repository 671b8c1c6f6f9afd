"""Training steps as CUDA graphs (`--cuda-graph`): what of a run they can hold, and how its loop calls them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revnets.training.capture.device_optimizer import check_capturable, left_out_by
from revnets.training.capture.step import CaptureError, TrainingStep, capture_step, has_graphs
from revnets.training.errors import UserError, one_line

from ..options import TrainOptions
from ..runtime import Runtime
from .training import Training


def check_capture(options: TrainOptions, runtime: Runtime) -> None:
    """Refuses what a captured step would not do.

    Args:
        options: All options.
        runtime: Device, processes and precision.

    Raises:
        UserError: Naming the option and the fix.
    """
    if not options.cuda_graph:
        return
    obstacles = {
        f"the run is on {runtime.device.type}, which has none; leave it out": not has_graphs(runtime.device),
        "several processes exchange gradients within a step; start one": runtime.distributed,
        "the loss scaler of float16 asks the GPU after each step; give --amp-dtype bfloat16": (
            runtime.amp_dtype is torch.float16
        ),
        f"--grad-accum-steps {options.grad_accum_steps} makes an update of several steps; leave one of them out": (
            options.grad_accum_steps > 1
        ),
        f"--clip-mode {options.clip_mode} is not captured; give --clip-mode norm": (
            options.clip_grad is not None and options.clip_mode != "norm"
        ),
        f"--sparsity-schedule {options.sparsity_schedule} changes masks between steps; give static": (
            options.sparsity_schedule != "static"
        ),
        "--memory-budget plans steps that are not captured; leave one of them out": bool(options.memory_budget),
        "--numerics-interval looks into steps; leave one of them out": options.numerics_interval > 0,
        "a teacher's part of a step is not captured; leave --teacher and --teacher-checkpoint out": bool(
            options.teacher or options.teacher_checkpoint
        ),
    }
    for why, there in obstacles.items():
        if there:
            raise UserError(f"--cuda-graph: {why}.")


def check_optimizer(options: TrainOptions, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuses an optimizer whose update cannot be captured.

    Args:
        options: All options.
        optimizer: Of the model.
        model: Which may have an update left out.

    Raises:
        UserError: Naming those that can.
    """
    if options.cuda_graph:
        try:
            check_capturable(optimizer, "--nonfinite-limit" if options.nonfinite_limit else left_out_by(model))
        except ValueError as error:
            raise UserError(f"--cuda-graph with --opt {options.opt}: {one_line(error)}.") from error


def captured_step(run: Training, images: Tensor, target: Tensor) -> tuple[Tensor, bool]:
    """A training step; the first ones prepare it. An incomplete batch runs eagerly.

    Args:
        run: The training; keeps the step.
        images: Of a batch, in its place.
        target: Of it.

    Returns:
        The loss, and whether the weights were updated.

    Raises:
        UserError: It cannot be captured.
        RangeError: Of exact mode; there was no update.
    """
    try:
        if run.step is None:
            run.step = _capture(run, images, target)
        return run.step(images, target), run.step.settle()
    except CaptureError as error:
        raise UserError(f"--cuda-graph: {one_line(error)}.") from error


def _capture(run: Training, images: Tensor, target: Tensor) -> TrainingStep:
    return capture_step(
        run.model,
        run.loss,
        run.optimizer,
        images,
        target,
        amp_dtype=run.runtime.amp_dtype,
        clip_grad=run.options.clip_grad,
        guard=run.guard,
        fallback=True,
    )
