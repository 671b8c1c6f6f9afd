"""Memory and FLOPs of a training step, known before it runs: no accelerator, no allocation."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..training.options.values import find_device
from .fake import ProfileError, explain, fake_input, fake_twin, new_fake_mode
from .memory import call, check_loss, check_step, mean_square, tensors_of
from .tracker import Event, StorageTracker, Trace

Tracker = TypeVar("Tracker", bound=StorageTracker)
CATEGORIES = ("parameters", "buffers", "gradients", "optimizer state", "input", "activations", "temporary")
"""``activations``: alive when the forward pass ends, or recomputed for the backward pass; ``temporary``: all else."""


@dataclass(frozen=True)
class StepPrediction:
    """One training step (forward, backward, optimizer) in the steady state: optimizer state there, gradients None.

    Attributes:
        peak_bytes: most bytes allocated at any moment, parameters and all included.
        categories: those bytes, by category (see ``CATEGORIES``); they sum to ``peak_bytes``.
        resident_bytes: what is there before the step: parameters, buffers, optimizer state, input.
        peak_phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        peak_where: op and module at the peak.
        gradient_bytes: one copy of the parameters' gradients.
        forward_flops: 2 per MAC.
        training_flops: forward and backward, recomputation included.
        timeline: bytes by category (in the order of ``CATEGORIES``) after every allocation.
        phases: of every entry of the timeline.
        parameters: how many numbers are trained.
    """

    peak_bytes: int
    categories: dict[str, int]
    resident_bytes: int
    peak_phase: str
    peak_where: str
    gradient_bytes: int
    forward_flops: int
    training_flops: int
    parameters: int
    timeline: list[tuple[int, ...]] = field(repr=False)
    phases: list[str] = field(repr=False)

    @property
    def step_bytes(self) -> int:
        """Peak beyond what is there before the step: what ``measure_training_step`` calls ``peak_bytes``."""
        return self.peak_bytes - self.resident_bytes

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass."""
        return self.forward_flops // 2


def predict_training_step(
    model: nn.Module,
    x: Any,
    loss_fn: Callable[[Any], Tensor] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    device: torch.device | str | None = None,
) -> StepPrediction:
    """Trace one training step of ``model`` on fake tensors and report its memory and FLOPs.

    Args:
        model: real, on ``torch.device("meta")`` or fake; it is copied without its memory, and left as it is. In the
            mode (train, memory mode, autocast inside) that is asked about.
        x: input, e.g. ``(N, C, H, W)``; real, meta or fake. For a model with several inputs a tuple of them, or a
            mapping by name.
        loss_fn: from the model's output to a scalar; by default the mean of squares, summed over all tensors of the
            output (in tuples, mappings, dataclasses).
        optimizer: makes one for a model; by default there is none.
        device: to predict for, at hand or not; by default that of ``x`` (CPU for meta).

    Raises:
        ProfileError: for arguments of which no step can be made, and when fake tensors cannot run the model; names the
            op, or what the model raised.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> predicted = predict_training_step(model, torch.ones(64, 8))
        >>> predicted.categories["parameters"], predicted.gradient_bytes, predicted.macs
        (576, 576, 8192)
    """
    tracker: StorageTracker = trace_training_step(model, x, loss_fn, optimizer, device)
    return summarize(tracker.trace, sum(p.numel() for p in model.parameters()))


def trace_training_step(
    model: nn.Module,
    x: Any,
    loss_fn: Callable[[Any], Tensor] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    device: torch.device | str | None = None,
    kind: type[Tracker] = StorageTracker,  # type: ignore[assignment]
) -> Tracker:
    """The tracker that followed one training step on fake tensors, for what a summary does not say.

    Args:
        model: see ``predict_training_step``, as ``x``, ``loss_fn``, ``optimizer`` and ``device``.
        x: input.
        loss_fn: from the model's output to a scalar.
        optimizer: makes one for a model.
        device: to predict for.
        kind: of the tracker.

    Raises:
        ProfileError: as there.
    """
    try:
        given = check_step(model, x, loss_fn, optimizer)
        wanted = find_device(device or ("cpu" if given.type == "meta" else given), here=False)
    except ValueError as error:
        raise ProfileError(str(error)) from None
    with new_fake_mode():
        twin = fake_twin(model, traceable(wanted))
        names = {module: name or type(module).__name__ for name, module in twin.named_modules()}
        tracker = kind(wanted, traceable(wanted), names)
        with tracker, _explained(tracker):
            _run(twin, fake_input(x, traceable(wanted)), loss_fn or mean_square, optimizer, tracker)
        return tracker


def traceable(device: torch.device) -> torch.device:
    """Where fake tensors for ``device`` can run backward: autograd asks the driver, so without one, as on CPU."""
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        return torch.device("cpu")
    return device


@contextmanager
def _explained(tracker: StorageTracker) -> Iterator[None]:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True  # it logs tracebacks of what becomes one sentence here
    try:
        yield
    except ProfileError:
        raise
    except Exception as error:  # of the model, the loss or the optimizer, which somebody chose
        raise explain(error, tracker.op) from error
    finally:
        logger.disabled = before


def _run(
    model: nn.Module,
    x: Any,
    loss_fn: Callable[[Any], Tensor],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None,
    tracker: StorageTracker,
) -> None:
    for parameter in model.parameters():
        tracker.follow(parameter, "parameters")
    for buffer in model.buffers():
        tracker.follow(buffer, "buffers")
    for tensor in tensors_of(x):
        tracker.follow(tensor, "input")
    optimizer = make_optimizer(model) if make_optimizer is not None else None
    with tracker.during("forward"):
        loss = check_loss(loss_fn(call(model, x)))
    for block in tracker.alive():
        block.category = block.category or ("activations" if block.phase == "forward" else None)
    with tracker.during("backward"):
        loss.backward()
    del loss
    for parameter in model.parameters():
        if parameter.grad is not None:
            tracker.follow(parameter.grad, "gradients")
    if optimizer is not None:
        _optimize(optimizer, tracker)


def _optimize(optimizer: torch.optim.Optimizer, tracker: StorageTracker) -> None:
    """Two optimizer steps: the first makes the state, the second is the one that counts."""
    if tracker.device.type != "cpu":
        for group in optimizer.param_groups:  # what torch chooses for real tensors there, and not for fake ones
            if group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True
    with tracker.during("setup"):
        optimizer.step()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                tracker.follow(value, "optimizer state")
    with tracker.during("optimizer"):
        optimizer.step()


def summarize(trace: Trace, parameters: int) -> StepPrediction:
    """Replay the events of a trace in the steady state, and find the peak."""
    category = [_category(block) for block in trace.blocks]
    now = dict.fromkeys(CATEGORIES, 0)
    for block, name in zip(trace.blocks, category, strict=True):
        if block.phase == "setup":
            now[name] += block.nbytes if block.category is not None else 0
    resident = sum(now.values())
    peak, at, peak_event = resident, dict(now), Event(None, 0, "forward", "")
    timeline, phases = [tuple(now.values())], ["forward"]
    for event in in_place(trace.events):
        if event.block is not None and trace.blocks[event.block].phase == "setup":
            continue
        name = "temporary" if event.block is None else category[event.block]
        now[name] += event.change
        if event.change > 0:
            timeline.append(tuple(now.values()))
            phases.append(event.phase)
        if sum(now.values()) > peak:
            peak, at, peak_event = sum(now.values()), dict(now), event
        if event.block is None:
            now[name] -= event.change
    return StepPrediction(
        peak_bytes=peak,
        categories=at,
        resident_bytes=resident,
        peak_phase=peak_event.phase,
        peak_where=peak_event.where,
        gradient_bytes=sum(b.nbytes for b, name in zip(trace.blocks, category, strict=True) if name == "gradients"),
        forward_flops=trace.flops["forward"],
        training_flops=trace.flops["forward"] + trace.flops["backward"],
        parameters=parameters,
        timeline=timeline,
        phases=phases,
    )


def _category(block: Any) -> str:
    if block.category is not None:
        return block.category
    return "activations" if block.phase == "backward" and block.recorded else "temporary"


def in_place(events: list[Event]) -> Iterator[Event]:
    """The events, with a sum of gradients replacing the former sum where that is released at once (see tracker)."""
    index = 0
    while index < len(events):
        event = events[index]
        following = events[index + 1] if index + 1 < len(events) else None
        if event.replaces is not None and following is not None and following.block == event.replaces:
            yield following
            index += 1
        yield event
        index += 1
