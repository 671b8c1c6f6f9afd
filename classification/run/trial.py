"""What timm and torch would refuse only at the first step or after an epoch, tried before a run makes its folder.

Each trial costs a fraction of a second and leaves weights, statistics and generators as they were.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from revnets.reversible import RangeError
from revnets.training.data.resumable import apart
from revnets.training.errors import UserError, refused

from ..options import TrainOptions
from ..runtime import Runtime

LOOKS = 10_000  # at the schedule's rates
DRAWS = 16  # of the augmentation


def try_optimizer(options: TrainOptions, runtime: Runtime, arguments: dict[str, Any]) -> None:
    """Takes two steps with such an optimizer on a tiny network: some look at their arguments only then.

    Args:
        options: All options.
        runtime: Device.
        arguments: Of `create_optimizer_v2`, without the layers' decay, which goes by the model.

    Raises:
        UserError: In the optimizer's words.
    """
    with apart(), refused(f"--opt: {options.opt} refuses its arguments", "correct --opt, --opt-betas or --opt-kwargs"):
        tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to(runtime.device)
        optimizer = create_optimizer_v2(tiny, **{k: v for k, v in arguments.items() if k != "layer_decay"})
        if getattr(optimizer, "is_second_order", False):
            raise UserError(
                f"--opt: {options.opt} needs second derivatives, which a training here does not compute; give adamw."
            )
        for _ in range(2):
            optimizer.zero_grad()
            tiny(torch.ones(2, 3, 3, 3, device=runtime.device)).sum().backward()
            optimizer.step()


def try_schedule(options: TrainOptions, lr: float, arguments: dict[str, Any], updates: int) -> None:
    """Walks through the whole schedule, every epoch and up to 10,000 of the updates.

    Args:
        options: All options.
        lr: The highest rate.
        arguments: Of `create_scheduler_v2`.
        updates: In an epoch.

    Raises:
        UserError: It fails on the way, or gives a rate that is none.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    what = f"--sched: timm refuses '{options.sched}' with these options"
    with apart(), refused(what, "correct --sched, --lr-cycle-... or --warmup-..., or give cosine alone"):
        scheduler, epochs = create_scheduler_v2(optimizer, **arguments)
        if scheduler is None:
            return
        stride = max(1, int(epochs) * updates // LOOKS)
        for epoch in range(int(epochs)):
            for update in range(-(-epoch * updates // stride) * stride, (epoch + 1) * updates, stride):
                scheduler.step_update(update)
                _check_rate(optimizer, f"epoch {epoch}")
            scheduler.step(epoch + 1, 0.0)
            _check_rate(optimizer, f"epoch {epoch + 1}")


def _check_rate(optimizer: torch.optim.Optimizer, when: str) -> None:
    rate = optimizer.param_groups[0]["lr"]
    if isinstance(rate, complex) or not math.isfinite(rate) or rate < 0:
        raise ValueError(f"the learning rate of {when} is {rate}")


def try_transforms(dataset: Any, mode: str, size: tuple[int, int]) -> None:
    """Sends a grey picture through a data set's transforms, some times where they are random.

    Args:
        dataset: Of timm, with its transforms set.
        mode: Of its images, `RGB` or `L`.
        size: Height and width that the network sees.

    Raises:
        UserError: In the words of the transform.
    """
    steps = [getattr(dataset, name, None) for name in ("transform", "augmentation", "normalize")]
    picture = Image.new(mode, (size[1] + 7, size[0] + 3), 128 if mode == "L" else (128, 64, 32))
    with (
        apart(),
        refused("augmentation: timm refuses an image", "correct --aa, --scale, --ratio or --crop-pct"),
    ):
        for _ in range(DRAWS):
            image: Any = picture
            for step in steps:
                image = image if step is None else step(image)


def try_step(
    options: TrainOptions, runtime: Runtime, model: nn.Module, loss: nn.Module, images: tuple[int, ...]
) -> None:
    """Computes the loss of one or two images in train mode, where batch norms and losses say what they do not take.

    Args:
        options: All options.
        runtime: Device and precision.
        model: Not wrapped, on its device.
        loss: Of the training.
        images: Channels, height and width.

    Raises:
        UserError: In the words of the layer or the loss.
    """
    count = min(options.batch_size, 2) * max(1, options.aug_splits)
    classes = options.num_classes or int(getattr(model, "num_classes", 1000))
    batch = torch.rand(count, *images, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(count, dtype=torch.long)
    if options.mixes:
        target = torch.full((count, classes), 1 / classes)
    before, was = {name: buffer.clone() for name, buffer in model.named_buffers()}, model.training
    what = f"--model: {options.model} cannot make a training step on {count} images of {'x'.join(map(str, images))}"
    try:
        with apart(), refused(what, "give another --batch-size, --img-size, --amp-dtype or loss"):
            batch, target = runtime.place(batch, target)
            with torch.no_grad(), runtime.autocast(), suppress(RangeError):  # of which the training has its own way
                loss(model.train()(batch), target)
    finally:
        model.train(was)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in before:
                    buffer.copy_(before[name])
