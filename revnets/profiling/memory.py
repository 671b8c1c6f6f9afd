"""Measured memory and time of one training step."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step (forward and backward, no optimizer), in bytes of tensors, and its time.

    Attributes:
        peak_bytes: most bytes allocated at any moment beyond what was there before the step (parameters, buffers and
            the input are not counted): allocated by tensors, not reserved by an allocator, not the process size.
        gradient_bytes: one copy of the parameters' gradients.
        seconds: of one step without the memory profiler, after one step of warm-up.
    """

    peak_bytes: int
    gradient_bytes: int
    seconds: float

    @property
    def activation_bytes(self) -> int:
        """Peak less one copy of the gradients: what grows with the batch."""
        return self.peak_bytes - self.gradient_bytes


def measure_training_step(model: nn.Module, x: Tensor, loss_fn: Callable[[Tensor], Tensor] | None = None) -> StepMemory:
    """Run three training steps of ``model`` on ``x`` (warm-up, timed, memory) and report memory and time.

    On CPU the allocations are those of torch's allocator as its profiler reports them, temporaries of kernels
    included; on an accelerator, the allocator's own peak counter. Gradients are set to None afterwards; running
    statistics move.

    Args:
        model: in the mode (train, memory mode, autocast) to be measured.
        x: input on the model's device, e.g. ``(N, C, H, W)``.
        loss_fn: from the model's output to a scalar; by default the mean of squares.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> measure_training_step(model, torch.ones(64, 8)).gradient_bytes
        576
    """
    loss_fn = loss_fn or _mean_square

    def step() -> None:
        loss_fn(model(x)).backward()

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        gc.collect()

    reset()
    step()
    gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    reset()
    _synchronize(x)
    start = time.perf_counter()
    step()
    _synchronize(x)
    seconds = time.perf_counter() - start
    reset()
    peak = _peak_on_cpu(step) if x.device.type == "cpu" else _peak_on_accelerator(step, x.device)
    reset()
    return StepMemory(peak, gradient_bytes, seconds)


def _mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


def _synchronize(x: Tensor) -> None:
    if x.device.type != "cpu":
        torch.get_device_module(x.device).synchronize(x.device)


def _peak_on_accelerator(step: Callable[[], None], device: torch.device) -> int:
    module = torch.get_device_module(device)
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    step()
    module.synchronize(device)
    return module.max_memory_allocated(device) - before


def _peak_on_cpu(step: Callable[[], None]) -> int:
    """Highest running sum of allocations and releases during ``step``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events() if profile.profiler is not None else []
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak
