"""The images that a network is pruned on, and passes over them that see what chosen layers read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .inputs import Moments

_BATCH = 64
Statistics = dict[str, tuple[Tensor, Tensor]]


def collect(data: Iterable[Any], images: int) -> list[Tensor]:
    """The first images of the data, in batches, kept in memory: every pass has to see the same ones.

    Args:
        data: a tensor ``(N, ...)``, or an iterable of such batches or of tuples that begin with one.
        images: how many to take.

    Raises:
        ValueError: for data that is empty, not of numbers, not finite, or of several shapes.

    Example:
        >>> [tuple(batch.shape) for batch in collect([(torch.ones(2, 3, 8, 8), 0), (torch.ones(2, 3, 8, 8), 1)], 3)]
        [(2, 3, 8, 8), (1, 3, 8, 8)]
    """
    if images < 1:
        raise ValueError(f"images={images}: expected at least 1 to calibrate on")
    found: list[Tensor] = []
    count = 0
    for number, batch in enumerate(data.split(_BATCH) if isinstance(data, Tensor) else data):
        taken = _checked(batch, number, found[0].shape[1:] if found else None)[: images - count].cpu()
        if len(taken):
            found.append(taken)
        count += len(taken)
        if count >= images:
            break
    if not count:
        raise ValueError("data: it holds no images to calibrate on; give some batches of them")
    return found


def _checked(batch: Any, number: int, expected: torch.Size | None) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    where = f"data: batch {number}"
    if not isinstance(images, Tensor):
        raise ValueError(f"{where} is a {type(images).__name__}, expected a tensor (N, C, H, W) or (images, ...)")
    if not images.is_floating_point() or images.dim() < 2:
        raise ValueError(
            f"{where} has shape {tuple(images.shape)} and {images.dtype}, expected normalised images (N, C, H, W)"
        )
    if expected is not None and images.shape[1:] != expected:
        raise ValueError(
            f"{where} has images of shape {tuple(images.shape[1:])}, those before are {tuple(expected)}; give one size"
        )
    if not images.isfinite().all():
        raise ValueError(f"{where} holds NaN or infinity; give finite images")
    return images.detach()


class _Enough(Exception):
    """All wanted layers have read their inputs."""


class Passes:
    """Passes of the calibration images through a network in eval mode.

    Args:
        model: on its device; changed by nobody here but ``recalibrate``.
        images: batches.
        calls: how often each module runs in a pass.
    """

    def __init__(self, model: nn.Module, images: list[Tensor], calls: Mapping[str, int]) -> None:
        like = next(model.parameters())
        self.model, self.images, self.calls = model, images, calls
        self._device, self._dtype = like.device, like.dtype

    @torch.no_grad()
    def watch(self, moments: Mapping[str, Moments], progress: Callable[[float], None]) -> None:
        """Add the inputs of layers to their moments; a pass ends where the last of them has run.

        Raises:
            ValueError: when inputs of a layer are not finite.
        """
        modules = dict(self.model.named_modules())
        handles = [modules[name].register_forward_pre_hook(_adder(each)) for name, each in moments.items()]
        missing = Counter({name: self.calls[name] for name in moments})
        handles += [modules[name].register_forward_hook(_counter(name, missing)) for name in moments]
        try:
            for done, batch in enumerate(self._batches(), start=1):
                missing.update({name: self.calls[name] - missing[name] for name in moments})
                with suppress(_Enough):
                    self.model(batch)
                progress(done / len(self.images))
        finally:
            for handle in handles:
                handle.remove()
        for name, each in moments.items():
            if not each.hessian().isfinite().all():
                raise ValueError(f"the inputs of {name or 'the model'} are not finite on the calibration images")

    @torch.no_grad()
    def statistics(self) -> Statistics:
        """Mean and variance by channel that each batch norm sees, means over all batches; the network stays as it is.

        Raises:
            ValueError: when a batch gives a batch norm a single value per channel.
        """
        norms = {n: m for n, m in self.model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
        if not norms:
            return {}
        with _estimating(list(norms.values())):
            try:
                for batch in self._batches():
                    self.model(batch)
            except ValueError as error:
                raise ValueError(
                    f"batch norms cannot be estimated anew ({error}): give larger batches, or recalibrate=False"
                ) from error
            return {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}  # type: ignore[union-attr]

    @torch.no_grad()
    def recalibrate(self, before: Statistics) -> int:
        """Change the running statistics of batch norms by what has changed on the images; returns how many there are.

        They are those of a training with its augmentation, which the images lack: taking the images' own instead would
        cost accuracy even where nothing is pruned.

        Args:
            before: of the network before it was pruned.
        """
        after = self.statistics()
        for name, (mean, var) in after.items():
            norm: Any = self.model.get_submodule(name)
            old_mean, old_var = before[name]
            norm.running_mean += mean - old_mean
            norm.running_var *= (var + norm.eps) / (old_var + norm.eps)
        return len(after)

    def _batches(self) -> Iterator[Tensor]:
        return (batch.to(self._device, self._dtype) for batch in self.images)


def _adder(moments: Moments) -> Callable[..., None]:
    return lambda module, args: moments.add(args[0])


def _counter(name: str, missing: Counter[str]) -> Callable[..., None]:
    def count(*_: Any) -> None:
        missing[name] -= 1
        if not any(left > 0 for left in missing.values()):
            raise _Enough

    return count


@contextmanager
def _estimating(norms: list[_BatchNorm]) -> Iterator[None]:
    before = [(norm.momentum, {name: value.clone() for name, value in norm._buffers.items()}) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: the mean over all batches
        norm.train()
    try:
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
            for name, value in buffers.items():
                norm._buffers[name].copy_(value)  # type: ignore[union-attr]


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices on a GPU without TF32, autocast off."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
