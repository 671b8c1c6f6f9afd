"""Measured memory and time of one training step."""

import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..training.options.values import COUNT


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step (forward, backward, and the optimizer's if there is one), in bytes, and its time.

    Attributes:
        peak_bytes: most bytes allocated at any moment beyond what was there before the step (parameters, buffers,
            optimizer state and the input are not counted): allocated by tensors, not reserved by an allocator, not the
            process size.
        gradient_bytes: one copy of the parameters' gradients.
        seconds: of one step without the memory profiler, after one step of warm-up.
        reserved_bytes: on an accelerator, the most that its allocator held from the device at any moment, everything
            included: what other programs cannot have. None on CPU, whose allocator keeps nothing back.
    """

    peak_bytes: int
    gradient_bytes: int
    seconds: float
    reserved_bytes: int | None = None

    @property
    def activation_bytes(self) -> int:
        """Peak less one copy of the gradients: what grows with the batch."""
        return self.peak_bytes - self.gradient_bytes


def measure_training_step(
    model: nn.Module,
    x: Any,
    loss_fn: Callable[[Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    repeats: int = 1,
) -> StepMemory:
    """Run training steps of ``model`` on ``x`` (warm-up, timed, memory) and report memory and time.

    On CPU the allocations are those of torch's allocator as its profiler reports them, temporaries of kernels
    included; on an accelerator, the allocator's own peak counter. Gradients are set to None afterwards; running
    statistics move, and with an optimizer the weights.

    Args:
        model: in the mode (train, memory mode, autocast) to be measured.
        x: input on the model's device, e.g. ``(N, C, H, W)``; a tuple of inputs, or a mapping of them by name.
        loss_fn: from the model's output to a scalar; by default the mean of squares (see ``mean_square``).
        optimizer: of the model's parameters; without one the step ends with the gradients.
        repeats: timed steps; their median counts.

    Raises:
        ValueError: for arguments of which no step can be made.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> measure_training_step(model, torch.ones(64, 8)).gradient_bytes
        576
    """
    device = check_step(model, x, loss_fn, None)
    COUNT.check("repeats", repeats)
    loss_fn = loss_fn or mean_square

    def step() -> None:
        check_loss(loss_fn(call(model, x))).backward()
        if optimizer is not None:
            optimizer.step()

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        gc.collect()

    reset()
    step()
    gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    seconds = []
    for _ in range(repeats):
        reset()
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    reset()
    if device.type == "cpu":
        with CpuAllocations() as allocations:
            step()
        peak, reserved = allocations.peak, None
    else:
        peak, reserved = _peaks_on_accelerator(step, device)
    reset()
    return StepMemory(peak, gradient_bytes, statistics.median(seconds), reserved)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in the output of a model: alone, in tuples, lists, mappings, dataclasses, or in these in turn.

    Example:
        >>> [t.item() for t in tensors_of({"a": torch.tensor(1), "b": (torch.tensor(2), None)})]
        [1, 2]
    """
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return tensors_of(list(output.values()))
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in tensors_of(item)]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return tensors_of([getattr(output, field.name) for field in dataclasses.fields(output)])
    return []


def mean_square(y: Any) -> Tensor:
    """The loss when none is given: the mean of squares, summed over the tensors of the output (see ``tensors_of``).

    Raises:
        ValueError: for an output without tensors of real numbers.
    """
    if isinstance(y, Tensor) and y.is_floating_point():
        return y.square().mean() if y.dtype not in (torch.float16, torch.bfloat16) else y.float().square().mean()
    outputs = [t for t in tensors_of(y) if t.is_floating_point()]
    if not outputs:
        raise ValueError(
            f"the model's output, {type(y).__name__}, holds no tensor of real numbers to take the mean of squares of: "
            "give loss_fn"
        )
    return torch.stack([t.float().square().mean() for t in outputs]).sum()


def call(model: nn.Module, x: Any) -> Any:
    """The output of a model for an input: a tensor, a tuple or list (one argument each) or a mapping (by name)."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


def check_step(model: nn.Module, x: Any, loss_fn: Any, optimizer: Any) -> torch.device:
    """The device of the input, once it is known that a training step could be made of these.

    Raises:
        ValueError: for arguments of another kind.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={type(model).__name__}: expected an nn.Module")
    inputs = tensors_of(x)
    if not inputs:
        raise ValueError(f"x={type(x).__name__}: expected a tensor, or a tuple or mapping of them, one per input")
    for name, value in (("loss_fn", loss_fn), ("optimizer", optimizer)):
        if value is not None and not callable(value):
            raise ValueError(f"{name}={type(value).__name__}: expected a function, or None")
    return inputs[0].device


def check_loss(loss: Any) -> Tensor:
    """The loss, if gradients can be had of it.

    Raises:
        ValueError: for anything but one number that depends on something to be trained.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shown = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss is of {shown}, expected a tensor of one number: let loss_fn give one")
    if not loss.requires_grad:
        raise ValueError(
            "the loss depends on nothing that is trained: the model has no parameter with requires_grad=True, or is "
            "under torch.no_grad()"
        )
    return loss


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _peaks_on_accelerator(step: Callable[[], None], device: torch.device) -> tuple[int, int]:
    module = torch.get_device_module(device)
    module.synchronize(device)
    module.empty_cache()
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    step()
    module.synchronize(device)
    return module.max_memory_allocated(device) - before, module.max_memory_reserved(device)


class CpuAllocations:
    """Context in which torch's CPU allocator is watched.

    Attributes:
        peak: the highest sum of allocations less releases.
        totals: that sum after each of them.

    Example:
        >>> with CpuAllocations() as allocations:
        ...     x = torch.ones(1000)
        >>> allocations.peak
        4000
    """

    peak = 0
    totals: tuple[int, ...] = ()

    def __enter__(self) -> "CpuAllocations":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints to stderr
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._profile.__exit__(*exc)
        profiler: Any = self._profile.profiler
        changes = sorted((e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]")
        self.totals = tuple(accumulate(change for _, change in changes))
        self.peak = max(0, max(self.totals, default=0))
