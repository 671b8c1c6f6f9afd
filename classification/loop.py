"""One epoch of training, and one pass of validation."""

from __future__ import annotations

import dataclasses
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from classification.data import TrainData
from classification.errors import UserError
from classification.options import TrainOptions
from classification.report import Steps
from classification.runtime import Runtime, memory_words, peak_memory, reset_peak_memory
from revnets.sparsity import SparsityController, apply_masks

_logger = logging.getLogger("classification")


@dataclasses.dataclass
class Training:
    """Everything that changes during a run, and what it is changed with."""

    options: TrainOptions
    runtime: Runtime
    model: nn.Module  # wrapped under torchrun
    optimizer: torch.optim.Optimizer
    loss: nn.Module
    data: TrainData
    scheduler: Any
    scaler: NativeScaler | None
    ema: ModelEmaV3 | None
    sparsity: SparsityController | None = None  # where there are sparse layers
    task: Any = None  # timm's training task around the model, where a teacher takes part

    @property
    def updates_per_epoch(self) -> int:
        """Updates of the weights in an epoch."""
        return -(-len(self.data.loader) // self.options.grad_accum_steps)


class _Losses:
    """Collects the losses of steps; on a GPU they are only looked at when a line of the log is due."""

    def __init__(self, epoch: int) -> None:
        self.meter = AverageMeter()
        self.epoch = epoch
        self._waiting: list[tuple[int, Tensor, int]] = []

    def add(self, step: int, loss: Tensor, count: int) -> None:
        self._waiting.append((step, loss.detach().float(), count))
        if loss.device.type == "cpu":
            self.look()

    def look(self) -> float:
        """Adds what is waiting to the mean.

        Raises:
            UserError: A loss is not finite.
        """
        values = torch.stack([loss for _, loss, _ in self._waiting]).tolist() if self._waiting else []
        for (step, _, count), value in zip(self._waiting, values, strict=True):
            if value != value or abs(value) == float("inf"):
                raise UserError(
                    f"the loss is {value} at step {step} of epoch {self.epoch}, a finite number was expected; "
                    "lower --lr, add --clip-grad 1, or use --amp-dtype bfloat16, and go on with --resume auto."
                )
            self.meter.update(value, count)
        self._waiting.clear()
        return float(self.meter.avg)


def train_epoch(run: Training, epoch: int) -> dict[str, float]:
    """Trains for one epoch.

    Args:
        run: What to train.
        epoch: Its number from 0.

    Returns:
        Mean loss over all processes, images per second, seconds, and peak memory.

    Raises:
        UserError: The loss stopped being finite.
    """
    options, runtime = run.options, run.runtime
    run.data.set_epoch(epoch, options.mixup_off_epoch)
    run.model.train()
    run.optimizer.zero_grad()
    reset_peak_memory(runtime.device)
    losses, total, images_seen, update = _Losses(epoch), len(run.data.loader), 0, epoch * run.updates_per_epoch
    start = time.perf_counter()
    with Steps(f"train {epoch}", total, options.log_interval, runtime.primary) as steps:
        for step, (images, target) in enumerate(run.data.loader, start=1):
            images, target = runtime.place(images, target)
            if run.data.mixup is not None:
                images, target = run.data.mixup(images, target)
            loss = _step(run, images, target, step, total)
            losses.add(step, loss, len(images))
            images_seen += len(images) * runtime.world_size
            if _updates(run, step, total):
                update += 1
                _after_update(run, update)
            if steps.due(step):
                rate = images_seen / (time.perf_counter() - start)
                steps.show(step, _note(losses.look(), run, rate))
    runtime.synchronize()
    seconds = time.perf_counter() - start
    losses.look()
    loss_sum, count = runtime.sum(float(losses.meter.sum), float(losses.meter.count))
    return {
        "loss": loss_sum / count,
        "images_per_s": images_seen / seconds,
        "seconds": seconds,
        **peak_memory(runtime.device),
    }


def _note(loss: float, run: Training, rate: float) -> str:
    lr = max(group["lr"] for group in run.optimizer.param_groups)
    return f"loss {loss:.4f} lr {lr:.2e} {rate:,.0f} images/s {memory_words(peak_memory(run.runtime.device))}"


def _updates(run: Training, step: int, total: int) -> bool:
    return step % run.options.grad_accum_steps == 0 or step == total


def _step(run: Training, images: Tensor, target: Tensor, step: int, total: int) -> Tensor:
    """Forward, backward, and the update of the weights where it is due; returns the batch's loss."""
    options = run.options
    every = options.grad_accum_steps
    last_group = total % every or every
    group = every if step <= total - last_group else last_group
    due = _updates(run, step, total)
    with _without_exchange(run.model, due):
        with run.runtime.autocast():
            loss: Tensor = run.task(images, target)["loss"] if run.task else run.loss(run.model(images), target)
        scaled = loss / group
        parameters = model_parameters(run.model, exclude_head="agc" in options.clip_mode) if options.clip_grad else None
        if run.scaler is not None:
            run.scaler(
                scaled,
                run.optimizer,
                clip_grad=options.clip_grad,
                clip_mode=options.clip_mode,
                parameters=parameters,
                need_update=due,
            )
        else:
            scaled.backward()
            if due:
                if parameters is not None:
                    dispatch_clip_grad(parameters, value=options.clip_grad, mode=options.clip_mode)
                run.optimizer.step()
    return loss


def _without_exchange(model: nn.Module, due: bool) -> AbstractContextManager[Any]:
    """Under DDP, gradients are only summed over the processes in the step that updates the weights."""
    if isinstance(model, DistributedDataParallel) and not due:
        return model.no_sync()
    return nullcontext()


def _after_update(run: Training, update: int) -> None:
    if run.sparsity is not None:
        masks = run.sparsity.step()
        if masks is not None:
            _logger.info(masks)
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.model, step=update)
        if run.sparsity is not None:
            apply_masks(run.ema.module, like=run.model)
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=update)


@torch.no_grad()
def validate(model: nn.Module, loader: Any, runtime: Runtime, title: str, log_interval: int) -> dict[str, float]:
    """Loss and accuracy over all images, each counted once however many processes share them.

    Args:
        model: Not wrapped.
        loader: Of the validation images.
        runtime: Device and processes.
        title: For the progress line.
        log_interval: Steps between two lines of the log.

    Returns:
        `loss`, `top1`, `top5` (percent), `images` and `images_per_s`.
    """
    model.eval()
    valid = _images_of_this_process(loader, runtime)
    sums = torch.zeros(4, dtype=torch.float64, device=runtime.device)  # loss, top-1, top-5, images
    start = time.perf_counter()
    with Steps(title, len(loader), log_interval, runtime.primary) as steps:
        for step, (images, target) in enumerate(loader, start=1):
            images, target = runtime.place(images, target)
            with runtime.autocast():
                output = model(images)
            take = min(len(target), valid)  # the last batch may hold images again, to give all processes equally many
            valid -= take
            if take:
                output, target = output[:take].float(), target[:take]
                top1, top5 = accuracy(output, target, topk=(1, 5))
                loss = nn.functional.cross_entropy(output, target)
                correct = (
                    torch.stack([top1, top5]).double() * (take / 100)
                ).round()  # whole images, not rounded percent
                sums += torch.stack([loss.double() * take, *correct, correct.new_tensor(take)])
            if steps.due(step):
                steps.show(step, "")
    loss_sum, top1_sum, top5_sum, count = runtime.sum(*sums.tolist())
    count = max(count, 1.0)
    seconds = time.perf_counter() - start
    result = {"loss": loss_sum / count, "top1": 100 * top1_sum / count, "top5": 100 * top5_sum / count}
    return {**result, "images": count, "images_per_s": count / seconds}


def _images_of_this_process(loader: Any, runtime: Runtime) -> int:
    dataset = loader.dataset
    if not runtime.distributed or not hasattr(dataset, "__getitem__"):
        return 1 << 62
    return (len(dataset) + runtime.world_size - 1 - runtime.rank) // runtime.world_size
