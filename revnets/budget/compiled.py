"""``torch.compile`` as a way to train a network, by the bytes and seconds that its shares were measured to take."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..profiling.fake import ProfileError
from ..profiling.memory import CpuAllocations, call, measure_training_step, synchronize
from ..profiling.turns import clock
from ..reversible.replay import generators_kept
from ..training.errors import reason, refused
from .choices import BudgetError, apply_choices, remove_choices
from .plan import Timeline
from .step import Step, device_of
from .watch import Figures

SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of torch's ``activation_memory_budget``; each is compiled, which takes minutes for some networks."""

ROUNDS = 3
"""Timed steps of each share and of plain training, by turns."""

_logger = logging.getLogger("revnets")

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Compiled:
    """A training step of a compiled network, as measured.

    Attributes:
        share: see ``choices.CHOICES``.
        resident_bytes: before the step.
        peak_bytes: most bytes in use at any moment of the step.
        kept_bytes: in use when its forward pass has ended, beyond what is resident.
        ratio: of its time to plain training's; to the fastest share's where plain training does not fit the device.
        timeline: of the step, without the optimizer's.
    """

    share: float
    resident_bytes: int
    peak_bytes: int
    kept_bytes: int
    ratio: float
    timeline: Timeline


def measured_compiled(
    model: nn.Module, step: Step, shares: Sequence[float] = SHARES, progress: Progress = iter
) -> Callable[[Figures], list[Compiled]]:
    """A function from a plain step's figures to what steps of the compiled network take, share by share.

    It runs training steps of the model where it is, on random input; weights, buffers, gradients, generators and the
    mode of training stay as they were. A share that cannot be compiled, or does not fit the device, is left out.

    Args:
        model: that the step is made of, on its device.
        step: that is planned.
        shares: to try.
        progress: wraps the shares, e.g. ``rich.progress.track``.

    Raises:
        BudgetError: for a model without memory, or one that cannot be compiled.
    """
    device = device_of(model)
    if any(p.is_meta for p in model.parameters()) or device.type != step.device.type:
        raise BudgetError(f"compile=True runs the model: put it on {step.device}, or leave compile out")

    def measure(figures: Figures) -> list[Compiled]:
        with _left_alone(model, device):
            return _Trial(model, step, device, figures).all(shares, progress)

    return measure


class _Trial:
    """Steps of one model, plain and compiled."""

    def __init__(self, model: nn.Module, step: Step, device: torch.device, figures: Figures) -> None:
        self.network, self.step, self.device, self.figures = model, step, device, figures
        self.model = _Autocast(model, device.type, step.amp_dtype) if step.amp_dtype is not None else model
        self.x = tree_map_only(Tensor, self._random, step.inputs)

    def _random(self, like: Tensor) -> Tensor:
        made = torch.randn(like.shape, device=self.device).to(like.dtype)
        last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        return made.to(memory_format=torch.channels_last) if last else made

    def all(self, shares: Sequence[float], progress: Progress) -> list[Compiled]:
        """What was measured of each share that can be compiled."""
        sizes: dict[float, tuple[int, int, tuple[int, ...], int]] = {}
        why = "no share was given"
        for share in progress(shares):
            try:
                with refused(f"compile=True, share {share:g}", kind=BudgetError), self._choice(share):
                    sizes[share] = self._sizes()
            except ProfileError as error:
                why = reason(error)
                _logger.info(f"{why}: left out")
        if not sizes:
            raise BudgetError(f"{self.step.title}: torch.compile has no step of it: {why}")
        seconds = self._seconds(tuple(sizes))
        reference = seconds.get(None) or min(seconds.values())
        return [self._compiled(share, *sizes[share], seconds[share] / reference) for share in sizes]

    @contextmanager
    def _choice(self, share: float | None) -> Iterator[None]:
        apply_choices(self.network, {} if share is None else {"": f"compile:{share:g}"})
        try:
            yield
        finally:
            remove_choices(self.network)
            self.network.zero_grad(set_to_none=True)

    def _sizes(self) -> tuple[int, int, tuple[int, ...], int]:
        """Peak, what is kept, and on a CPU the allocations of a step, with the place where the forward pass ends."""
        peak = measure_training_step(self.model, self.x, self.step.loss_fn).peak_bytes
        if self.device.type != "cpu":
            before = torch.get_device_module(self.device).memory_allocated(self.device)
            loss = self.step.loss_fn(call(self.model, self.x))
            kept = torch.get_device_module(self.device).memory_allocated(self.device) - before
            del loss
            return peak, kept, (0, kept, peak, 0), 1
        with CpuAllocations() as forward:
            loss = self.step.loss_fn(call(self.model, self.x))
        del loss
        with CpuAllocations() as both:
            self.step.loss_fn(call(self.model, self.x)).backward()
        return peak, forward.totals[-1] if forward.totals else 0, both.totals, len(forward.totals)

    def _seconds(self, shares: Sequence[float]) -> dict[float | None, float]:
        """Medians by share, and of plain training by None, by turns; a plain step may not fit the device."""
        taken: dict[float | None, list[float]] = {share: [] for share in (None, *shares)}
        now = clock(self.device)
        for _ in range(ROUNDS):
            for share in list(taken):
                try:
                    with self._choice(share):
                        for _ in range(2):  # the second one counts: it finds memory as it leaves it
                            self.network.zero_grad(set_to_none=True)
                            synchronize(self.device)
                            start = now()
                            self.step.loss_fn(call(self.model, self.x)).backward()
                            synchronize(self.device)
                            seconds = now() - start
                        taken[share].append(seconds)
                except torch.OutOfMemoryError:
                    if share is not None:
                        raise
                    del taken[share]
        return {share: statistics.median(found) for share, found in taken.items()}

    def _compiled(
        self, share: float, peak: int, kept: int, totals: tuple[int, ...], forward: int, ratio: float
    ) -> Compiled:
        resident = self.figures.resident
        stride = max(1, -(-len(totals) // 1000))
        line = tuple(resident + max(totals[i : i + stride]) for i in range(0, len(totals), stride))
        highest = max(resident + peak, self.figures.optimizer)
        return Compiled(share, resident, highest, kept, ratio, Timeline(line, forward // stride, len(line)))


class _Autocast(nn.Module):
    """The model under autocast, so that the loss stays outside."""

    def __init__(self, model: nn.Module, device_type: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.device_type, self.dtype = model, device_type, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, dtype=self.dtype):
            return self.model(*args, **kwargs)


@contextmanager
def _left_alone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave buffers, gradients, generators and modes as they were, whatever is run inside."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    grads = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    draws = generators_kept(torch.empty(0, device=device)) if device.type != "meta" else nullcontext()
    try:
        model.zero_grad(set_to_none=True)
        if not model.training:
            model.train()
        with draws:
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modes:
            module.training = training
