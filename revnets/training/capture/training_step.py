"""A training step that may be replayed as a CUDA graph; ``capture_step`` makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...reversible import RangeError
from ...reversible.mode import MODES
from ...reversible.node import RangeGuard, captured
from ..guards.finite import FiniteGuard, SkippedByScaler
from ..untouched import untouched
from .cuda_graph import CaptureError, CudaGraph, record
from .device_optimizer import DeviceOptimizer, check_capturable, left_out_by

Loss = Callable[[Any, Tensor], Tensor]


@dataclass
class _Outcome:
    """What a step leaves on the device: its loss, exact mode's guards, and a list of numbers to be looked at."""

    loss: Tensor
    guards: list[RangeGuard]
    report: Tensor | None


class TrainingStep:
    """A training step ``(x, target) -> loss``; made by ``capture_step``.

    A step in a graph is looked at when the next one is called, or by ``settle``: so the host runs ahead of the device.

    Attributes:
        captured: whether the next call of the captured shape replays a graph.
        skipped: updates that were left out so far.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Loss, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor
    ) -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.amp_dtype: torch.dtype | None = None
        self.scaler: Any = None
        self.clip_grad: float | None = None
        self.accumulate = 1
        self.guard: FiniteGuard | None = None
        self.fallback = False
        self.captured = False
        self.skipped = 0
        self._x, self._target = x.detach().clone(), target.detach().clone()
        own = {id(p): p for p in model.parameters()}
        own |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self._parameters: list[Tensor] = list(own.values())
        self._parts = [m for m in model.modules() if vars(m).get("mode") in MODES]
        self._modes: list[str] = []
        self._device_optimizer: DeviceOptimizer | None = None
        self._graph: CudaGraph | None = None
        self._outcome: _Outcome | None = None
        self._pending: Callable[[], list[float]] | None = None
        self._updated = False

    # --- what the caller sees ---------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """One step; returns its loss, on the device.

        Raises:
            ValueError: for another shape, type or device, and for settings that were changed since.
            RangeError: of exact mode, whose update was left out; a replayed step's when the next one is called.
        """
        self.settle()
        same, optimizer = self._fits(x, target), self._device_optimizer
        refusal = self._refusal()
        if refusal:
            raise ValueError(f"{refusal}: capture the step again")
        if optimizer is not None:
            optimizer.show_rates()
        if optimizer is None or self._graph is None:
            return self._eagerly(x, target)
        if not same or not optimizer.ready:
            self.captured = self.captured and optimizer.ready
            return self._eagerly(x, target)
        if not self.captured:
            self._capture(self._graph, optimizer)
        self._x.copy_(x)
        self._target.copy_(target)
        self._graph.replay()
        outcome: Any = self._outcome
        self._updated = True
        self._pending = None if outcome.report is None else self._graph.fetch(outcome.report)
        return outcome.loss.clone()

    def settle(self) -> bool:
        """Looks at the last step, which waits for the device; returns whether it made its update.

        Raises:
            RangeError: of exact mode.
        """
        if self._pending is None:
            return self._updated
        values, self._pending = self._pending(), None
        self._updated = bool(values[0])
        self.skipped += not self._updated
        outcome: Any = self._outcome
        start = 1
        for guard in outcome.guards:
            end = start + guard.maxima.numel()
            guard.check(values[start:end])
            start = end
        if self.guard is not None:
            self.guard.told(self._updated)
        return self._updated

    def _fits(self, x: Tensor, target: Tensor) -> bool:
        """Whether a batch is of the captured shape; where others are not taken, says what was captured."""
        for name, given, own in (("x", x, self._x), ("target", target, self._target)):
            if (given.shape, given.dtype, given.device) == (own.shape, own.dtype, own.device):
                continue
            if self.fallback and given.device == own.device and len(given) % self.accumulate == 0:
                return False
            raise ValueError(
                f"the step was captured for {name} of {_words(own)}, got {_words(given)}: leave incomplete batches out "
                "(drop_last=True), or capture with fallback=True, which runs other shapes eagerly"
            )
        return True

    def _refusal(self) -> str:
        """What has changed that the step would not follow, or nothing."""
        if not self.model.training:
            return f"{type(self.model).__name__} is in eval mode, and was captured in training mode"
        if self._modes and self._modes != [part.mode for part in self._parts]:
            return f"the memory mode of {type(self.model).__name__} was changed after its step was captured"
        return self._device_optimizer.refusal() if self.captured and self._device_optimizer is not None else ""

    # --- getting ready ----------------------------------------------------------------------------------------------

    def prepare(self, graph: CudaGraph | None, watched: bool) -> None:
        """Makes the optimizer ready for a device with graphs.

        Args:
            graph: to be captured into, or None.
            watched: updates may have to be left out.

        Raises:
            ValueError: where the optimizer cannot do that on the device.
        """
        check_capturable(self.optimizer, "the loss scaler or the guard" if watched else left_out_by(self.model))
        self._device_optimizer = DeviceOptimizer(self.optimizer, self._x.device)
        self._graph = graph

    def warm_up(self, steps: int) -> None:
        """Tries steps, and leaves everything as it was."""
        with untouched(self.model, self.optimizer, self._x, self.scaler):
            optimizer = self._device_optimizer
            if self._graph is None or optimizer is None:
                for _ in range(steps):
                    self._eagerly(self._x, self._target)
            else:
                optimizer.show_rates()
                self._graph.warm_up(lambda: [self._on_device(optimizer) for _ in range(steps)])
        if self._device_optimizer is not None:
            self._device_optimizer.ready = False
        self._updated, self.skipped = False, 0

    def _capture(self, graph: CudaGraph, optimizer: DeviceOptimizer) -> None:
        before = optimizer.inventory()

        def run() -> None:
            self._outcome = self._on_device(optimizer)

        record(graph, run, f"a step of {type(self.model).__name__}", "model, loss or optimizer")
        if optimizer.inventory() != before:
            raise CaptureError(
                f"{type(self.optimizer).__name__} makes its state anew in every step, which a CUDA graph cannot hold: "
                "train without capture"
            )
        optimizer.fix()
        self._modes = [str(part.mode) for part in self._parts]
        self.captured = True

    # --- the step ---------------------------------------------------------------------------------------------------

    def _eagerly(self, x: Tensor, target: Tensor) -> Tensor:
        """An ordinary step, with the optimizer as it is captured."""
        self._forget_gradients()
        self._updated = False
        losses = []
        try:
            for part in self._parts_of(x, target):
                loss = self._loss(*part)
                losses.append(loss.detach())
                if self.guard is not None:
                    self.guard.note(loss)
                self._backward(loss)
        except RangeError:
            self.skipped += 1
            self._forget_gradients()
            raise
        optimizer = self._device_optimizer
        with nullcontext() if optimizer is None else optimizer.computing(on_device=False):
            self._updated = self._update()
        self.skipped += not self._updated
        if optimizer is not None:
            optimizer.ready = optimizer.ready or self._updated
        return losses[0] if self.accumulate == 1 else sum(losses[1:], losses[0]) / self.accumulate

    def _update(self) -> bool:
        """Clips and steps, unless loss or gradients are not finite."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            self._clip()
            with SkippedByScaler(self.scaler) as scaler:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            if self.guard is None:
                return not scaler.skipped
            return self.guard.good(gradients=False, skipped=scaler.skipped)
        if self.guard is not None and not self.guard.good():
            return False
        self._clip()
        self.optimizer.step()
        return True

    def _on_device(self, optimizer: DeviceOptimizer) -> _Outcome:
        """The same, without a look at the device: this is captured."""
        self._forget_gradients()
        losses = []
        with captured() as guards:
            for part in self._parts_of(self._x, self._target):
                loss = self._loss(*part)
                losses.append(loss.detach())
                self._backward(loss)
        loss = losses[0] if self.accumulate == 1 else torch.stack(losses).mean()
        good = self._good(loss, guards)
        with optimizer.computing(on_device=True):
            if self.scaler is not None:
                self._tell_scaler(good)
                self.scaler.unscale_(self.optimizer)
            self._clip()
            if self.scaler is not None:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                optimizer.step(None if good is None else 1 - good.float())
        if good is None:
            return _Outcome(loss, guards, None)
        maxima = [guard.maxima.double() for guard in guards]
        return _Outcome(loss, guards, torch.cat([good.double().reshape(1), *maxima]))

    def _good(self, loss: Tensor, guards: list[RangeGuard]) -> Tensor | None:
        """Whether the update is to be made, as a number on the device; None where nobody looks."""
        found = [guard.kept() for guard in guards]
        if self.guard is not None or self.scaler is not None:
            grads = [p.grad for p in self._parameters if p.grad is not None]
            norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
            found.append(torch.stack([loss.float(), *norms]).isfinite().all())
        return torch.stack(found).all() if found else None

    def _tell_scaler(self, good: Tensor | None) -> None:
        """Has the scaler find what it looks for, where exact mode's range or the loss is bad and gradients are not."""
        first = next((p.grad for p in self._parameters if p.grad is not None), None)
        if good is not None and first is not None:
            first.copy_(torch.where(good, first, torch.nan))

    def _parts_of(self, x: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if self.accumulate == 1:
            return iter([(x, target)])
        return zip(x.chunk(self.accumulate), target.chunk(self.accumulate), strict=True)

    def _loss(self, x: Tensor, target: Tensor) -> Tensor:
        with self._autocast():
            return self.loss_fn(self.model(x), target)

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp_dtype is None else torch.autocast(self._x.device.type, dtype=self.amp_dtype)

    def _backward(self, loss: Tensor) -> None:
        loss = loss if self.accumulate == 1 else loss / self.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _clip(self) -> None:
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_([p for p in self._parameters if p.grad is not None], self.clip_grad)

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _words(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
