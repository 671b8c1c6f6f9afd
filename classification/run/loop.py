"""One epoch of training, and one pass of validation."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import AverageMeter, accuracy, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revnets.reversible import RangeError
from revnets.sparsity import apply_masks
from revnets.training.data.resumable import MODEL, seed_all
from revnets.training.errors import UserError, one_line
from revnets.training.guards.finite import SkippedByScaler
from revnets.training.guards.ranges import AgreedRangeError, ranges_agreed
from revnets.training.memory import memory_words, peak_memory, reset_peak_memory
from revnets.training.progress import Steps

from ..runtime import Runtime
from .captured import captured_step
from .recovery import Position
from .training import Training

_logger = logging.getLogger("classification")


class _Losses:
    """Collects the losses of steps; on a GPU they are only looked at when a line of the log is due.

    Those that are not finite are left out of the mean: their updates are skipped.
    """

    def __init__(self, start: Position) -> None:
        self.meter = AverageMeter()
        self.epoch = start.epoch
        if start.loss_count:
            self.meter.sum, self.meter.count = start.loss_sum, start.loss_count
            self.meter.avg = start.loss_sum / start.loss_count
        self._waiting: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, count: int) -> None:
        self._waiting.append((loss.detach().float(), count))
        if loss.device.type == "cpu":
            self.look()

    def look(self) -> float:
        """Adds what is waiting to the mean."""
        values = torch.stack([loss for loss, _ in self._waiting]).tolist() if self._waiting else []
        for (_, count), value in zip(self._waiting, values, strict=True):
            if math.isfinite(value):
                self.meter.update(value, count)
        self._waiting.clear()
        return float(self.meter.avg)

    def position(self, step: int) -> Position:
        """Where the run is after so many batches of the epoch."""
        self.look()
        return Position(self.epoch, step, float(self.meter.sum), float(self.meter.count))


def train_epoch(run: Training, begin: Position) -> tuple[dict[str, float], Position]:
    """Trains for one epoch, or what is left of it.

    Args:
        run: What to train.
        begin: Where.

    Returns:
        Mean loss over all processes, images per second, seconds, and peak memory; and the epoch's end.

    Raises:
        UserError: Loss or gradients were not finite too often.
        Terminated: After SIGTERM; the run is saved.
    """
    options, runtime, epoch = run.options, run.runtime, begin.epoch
    run.data.start(epoch, begin.step, options.mixup_off_epoch, runtime.rank)
    run.model.train()
    run.optimizer.zero_grad()
    reset_peak_memory(runtime.device)
    losses, total, images_seen = _Losses(begin), len(run.data.loader), 0
    update = run.updates_before(begin)
    start = time.perf_counter()
    with Steps(f"train {epoch}", total, options.log_interval, runtime.primary) as steps:
        for step, (images, target) in enumerate(run.data.loader if begin.step < total else (), start=begin.step + 1):
            seed_all(options.seed, MODEL, runtime.rank, epoch * total + step)
            images, target = runtime.place(images, target)
            if run.data.mixup is not None:
                images, target = run.data.mixup(images, target)
            _look_at_drift(run, images, epoch * total + step - 1)
            loss, updated = _step(run, images, target, step, total)
            losses.add(loss, len(images))
            images_seen += len(images) * runtime.world_size
            if _updates(run, step, total):
                update += 1
                _after_update(run, update, updated)
                if step < total:
                    position = functools.partial(losses.position, step)
                    run.recovery.check(position, total, options.grad_accum_steps)
            if steps.due(step):
                rate = images_seen / (time.perf_counter() - start)
                steps.show(step, _note(losses.look(), run, rate))
    runtime.synchronize()
    seconds = time.perf_counter() - start
    end = losses.position(total)
    loss_sum, count = runtime.sum(end.loss_sum, end.loss_count)
    figures = {
        "loss": loss_sum / count if count else math.nan,
        "images_per_s": images_seen / seconds,
        "seconds": seconds,
        **({"skipped": float(run.guard.skipped)} if run.guard.skipped else {}),
        **({"drift": run.drift.worst} if run.drift.worst else {}),
        **peak_memory(runtime.device),
    }
    return figures, end


def _look_at_drift(run: Training, images: Tensor, step: int) -> None:
    if run.drift.due(step) and run.runtime.primary:
        with run.runtime.autocast():
            warning = run.drift.check(images)
        if warning:
            _logger.warning(f"step {step}: {warning}, here --model-kwargs exact=true")


def _note(loss: float, run: Training, rate: float) -> str:
    lr = max(group["lr"] for group in run.optimizer.param_groups)
    return f"loss {loss:.4f} lr {lr:.2e} {rate:,.0f} images/s {memory_words(peak_memory(run.runtime.device))}"


def _updates(run: Training, step: int, total: int) -> bool:
    return step % run.options.grad_accum_steps == 0 or step == total


def _step(run: Training, images: Tensor, target: Tensor, step: int, total: int) -> tuple[Tensor, bool]:
    """Forward, backward, and the update of the weights where it is due; returns the batch's loss, and if it updated.

    Raises:
        UserError: Loss or gradients were not finite too often.
    """
    options, due = run.options, _updates(run, step, total)
    every = options.grad_accum_steps
    last_group = total % every or every
    group = every if step <= total - last_group else last_group
    try:
        if options.cuda_graph:
            loss, updated = captured_step(run, images, target)
        else:
            loss, updated = _eager_step(run, images, target, group, due)
    except RangeError as error:  # exact mode's guard
        _logger.warning(f"step {step}: {one_line(error)}")
        run.guard.failed(one_line(error) if isinstance(error, AgreedRangeError) else "")
        run.optimizer.zero_grad()
        loss, updated = images.new_full((), math.nan), False
    if due and not updated:
        _logger.warning(
            f"step {step}: loss ({float(loss.detach()):.3g}) or gradients are not finite, the update is skipped "
            f"({run.guard.skipped} so far)"
        )
    if run.guard.exhausted:
        raise UserError(one_line(run.guard.give_up(functools.partial(_loss_again, run, images, target))) + ".")
    return loss, updated


def _eager_step(run: Training, images: Tensor, target: Tensor, group: int, due: bool) -> tuple[Tensor, bool]:
    with _without_exchange(run.model, due):
        with ranges_agreed(), run.runtime.autocast():
            loss: Tensor = run.task(images, target)["loss"] if run.task else run.loss(run.model(images), target)
        run.guard.note(loss)
        return loss, _backward(run, loss / group, due)


def _loss_again(run: Training, images: Tensor, target: Tensor) -> Tensor:
    with run.runtime.autocast():
        return run.loss(run.plain(images), target)


def _backward(run: Training, loss: Tensor, due: bool) -> bool:
    """Gradients and, where it is due and all is finite, the update."""
    options, clip = run.options, run.options.clip_grad
    parameters = model_parameters(run.model, exclude_head="agc" in options.clip_mode) if clip else None
    if run.scaler is not None:
        with SkippedByScaler(run.scaler._scaler) as scaler:
            run.scaler(
                loss, run.optimizer, clip_grad=clip, clip_mode=options.clip_mode, parameters=parameters, need_update=due
            )
        return due and run.guard.good(gradients=False, skipped=scaler.skipped)
    loss.backward()
    if not due or not run.guard.good():
        return False
    if parameters is not None:
        dispatch_clip_grad(parameters, value=clip, mode=options.clip_mode)
    run.optimizer.step()
    return True


def _without_exchange(model: nn.Module, due: bool) -> AbstractContextManager[Any]:
    """Under DDP, gradients are only summed over the processes in the step that updates the weights."""
    if isinstance(model, DistributedDataParallel) and not due:
        return model.no_sync()
    return nullcontext()


def _after_update(run: Training, update: int, updated: bool) -> None:
    if run.numerics is not None:
        run.numerics.step()
    if run.sparsity is not None:
        masks = run.sparsity.step()
        if masks is not None:
            _logger.info(masks)
    run.optimizer.zero_grad()
    if run.ema is not None and updated:
        run.ema.update(run.model, step=update)
        if run.sparsity is not None:
            apply_masks(run.ema.module, like=run.model)
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=update)


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: Any,
    runtime: Runtime,
    title: str,
    log_interval: int,
    after_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Loss and accuracy over all images, each counted once however many processes share them.

    Args:
        model: Not wrapped.
        loader: Of the validation images.
        runtime: Device and processes.
        title: For the progress line.
        log_interval: Steps between two lines of the log.
        after_batch: Called after each; it may end the run.

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
            if after_batch is not None:
                after_batch()
    loss_sum, top1_sum, top5_sum, count = runtime.sum(*sums.tolist())
    if not count:
        raise UserError("--val-split: there was no image in it to validate on; give another.")
    seconds = time.perf_counter() - start
    result = {"loss": loss_sum / count, "top1": 100 * top1_sum / count, "top5": 100 * top5_sum / count}
    return {**result, "images": count, "images_per_s": count / seconds}


def _images_of_this_process(loader: Any, runtime: Runtime) -> int:
    dataset = loader.dataset
    if not runtime.distributed or not hasattr(dataset, "__getitem__"):
        return 1 << 62
    return (len(dataset) + runtime.world_size - 1 - runtime.rank) // runtime.world_size
