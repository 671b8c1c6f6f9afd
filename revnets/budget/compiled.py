"""``torch.compile`` as a way to train a network, by the bytes and seconds that its shares were measured to take."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..profiling.fake import ProfileError
from ..profiling.memory import CpuAllocations, call, measure_training_step
from ..profiling.profile import free_bytes
from ..profiling.target import Autocast
from ..profiling.turns import second_of_two
from ..reversible.replay import generators_kept
from ..training.errors import reason, refused
from .choices import BudgetError, apply_choices, modes_of, put_modes, remove_choices
from .measure import trial_inputs
from .plan import Timeline, undone
from .step import Step, device_of
from .watch import Figures

SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of torch's ``activation_memory_budget``; each is compiled, which takes minutes for some networks."""

ROUNDS = 3
"""Timed steps of each share and of plain training, by turns."""

_logger = logging.getLogger("revnets")

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Measure = Callable[[Figures, str | None], "list[Compiled]"]


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
) -> Measure:
    """A function from a plain step's figures, and reversible parts' mode, to what compiled steps take, share by share.

    It runs forward and backward passes of the model where it is, on the given input or a random one; buffers,
    gradients, torch's generators, modes and an earlier plan are put back. A share that cannot be compiled, or does not
    fit the device, is left out.

    Args:
        model: that the step is made of, on its device.
        step: that is planned.
        shares: to try.
        progress: wraps the shares, e.g. ``rich.progress.track``.

    Raises:
        BudgetError: for a model without memory, one that cannot be compiled, or one whose weights change by hooks.
    """
    device = device_of(model)
    if any(p.is_meta for p in model.parameters()) or device.type != step.device.type:
        raise BudgetError(f"compile=True runs the model: put it on {step.device}, or leave compile out")

    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters()):
        raise BudgetError("compile=True runs steps, by which hooks would change weights: register them after the fit")

    def measure(figures: Figures, mode: str | None = None) -> list[Compiled]:
        with _left_alone(model, device):
            return _Trial(model, step, device, figures, mode).all(shares, progress)

    return measure


class _Trial:
    """Steps of one model, plain and compiled."""

    def __init__(self, model: nn.Module, step: Step, device: torch.device, figures: Figures, mode: str | None) -> None:
        self.network, self.step, self.device, self.figures, self.mode = model, step, device, figures, mode
        self.model = Autocast(model, device.type, step.amp_dtype) if step.amp_dtype is not None else model
        self.x = trial_inputs(step, device)
        self.plain_fits = device.type != "cpu" or figures.peak - figures.resident < free_bytes(device)

    def all(self, shares: Sequence[float], progress: Progress) -> list[Compiled]:
        """What was measured of each share that can be compiled."""
        sizes: dict[float, tuple[int, int, tuple[int, ...], int]] = {}
        why = "no share was given"
        for share in progress([share for share in shares if share < 1 or self.plain_fits]):
            try:
                with refused(f"compile=True, share {share:g}", kind=BudgetError), self._choice(share):
                    sizes[share] = self._sizes()
            except ProfileError as error:
                why = reason(error)
                _logger.info(f"{why}: left out")
        seconds = self._seconds(tuple(sizes)) if sizes else {}
        measured = [share for share in sizes if share in seconds]
        if not measured:
            raise BudgetError(f"{self.step.title}: torch.compile has no step of it: {why}")
        reference = seconds.get(None) or min(seconds.values())
        return [self._compiled(share, *sizes[share], seconds[share] / reference) for share in measured]

    @contextmanager
    def _choice(self, share: float | None) -> Iterator[None]:
        apply_choices(self.network, {} if share is None else {"": f"compile:{share:g}"}, self.mode)
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
        """Medians by share, and of plain training by None, by turns; without what does not fit the device."""
        taken: dict[float | None, list[float]] = {share: [] for share in (None, *shares)}
        if not self.plain_fits:
            del taken[None]
        for _ in range(ROUNDS):
            for share in list(taken):
                try:
                    with refused("a timed step", kind=BudgetError), self._choice(share):
                        taken[share].append(second_of_two(self.model, self.x, self.step.loss_fn, self.device))
                except ProfileError as error:
                    _logger.info(f"{'plain' if share is None else f'share {share:g}'}: {reason(error)}: left out")
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


@contextmanager
def _left_alone(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave buffers, gradients, generators, modes and plans as they were, whatever is run inside."""
    put_back_plan = undone(model)
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    grads = [(p, p.grad) for p in model.parameters()]
    training, modes = [(module, module.training) for module in model.modules()], modes_of(model)
    try:
        model.zero_grad(set_to_none=True)
        if not model.training:
            model.train()
        with generators_kept(torch.empty(0, device=device)):
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        for module, was in training:
            module.training = was
        put_modes(model, modes)
        put_back_plan()
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
