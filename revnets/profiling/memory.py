"""Measured memory and time of one training step."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
    x: Tensor,
    loss_fn: Callable[[Tensor], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    repeats: int = 1,
) -> StepMemory:
    """Run training steps of ``model`` on ``x`` (warm-up, timed, memory) and report memory and time.

    On CPU the allocations are those of torch's allocator as its profiler reports them, temporaries of kernels
    included; on an accelerator, the allocator's own peak counter. Gradients are set to None afterwards; running
    statistics move, and with an optimizer the weights.

    Args:
        model: in the mode (train, memory mode, autocast) to be measured.
        x: input on the model's device, e.g. ``(N, C, H, W)``.
        loss_fn: from the model's output to a scalar; by default the mean of squares.
        optimizer: of the model's parameters; without one the step ends with the gradients.
        repeats: timed steps; their median counts.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> measure_training_step(model, torch.ones(64, 8)).gradient_bytes
        576
    """
    loss_fn = loss_fn or mean_square

    def step() -> None:
        loss_fn(model(x)).backward()
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
        synchronize(x.device)
        start = time.perf_counter()
        step()
        synchronize(x.device)
        seconds.append(time.perf_counter() - start)
    reset()
    if x.device.type == "cpu":
        with CpuAllocations() as allocations:
            step()
        peak, reserved = allocations.peak, None
    else:
        peak, reserved = _peaks_on_accelerator(step, x.device)
    reset()
    return StepMemory(peak, gradient_bytes, statistics.median(seconds), reserved)


def mean_square(y: Tensor) -> Tensor:
    """The loss when none is given."""
    return y.square().mean()


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
    """Context in which torch's CPU allocator is watched: ``peak`` is the highest sum of allocations less releases.

    Example:
        >>> with CpuAllocations() as allocations:
        ...     x = torch.ones(1000)
        >>> allocations.peak
        4000
    """

    peak = 0

    def __enter__(self) -> "CpuAllocations":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints to stderr
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._profile.__exit__(*exc)
        profiler: Any = self._profile.profiler
        total = 0
        for _, change in sorted(
            (e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]"
        ):
            total += change
            self.peak = max(self.peak, total)
