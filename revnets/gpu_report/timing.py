"""Kernels and energy of steps on a GPU, and its memory given back."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..profiling.memory import synchronize
from ..profiling.turns import Step


def kernels(step: Step, device: torch.device) -> int | None:
    """Kernels that a step launches on a GPU, copies and fills included; None elsewhere, and where CUPTI sees none."""
    if device.type != "cuda":
        return None
    synchronize(device)
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            step()
            synchronize(device)
        events: Any = found.profiler
        kind = torch.autograd.DeviceType.CUDA
        return sum(1 for event in events.kineto_results.events() if event.device_type() == kind) or None
    except (AttributeError, RuntimeError):
        traceback.print_exc()  # a count less is no reason to lose the times
        return None


class Energy:
    """The energy counter of a GPU; where NVML does not give it, ``joules`` is None.

    Args:
        device: whose.
    """

    def __init__(self, device: torch.device) -> None:
        self.reason = "" if device.type == "cuda" else "no GPU"
        self._read: Callable[[], float] | None = None
        if self.reason:
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except Exception as error:  # the module is missing, or the card keeps no count
            self.reason = f"NVML gives no energy here: {error}"

    def joules(self, step: Step, device: torch.device, count: int) -> float | None:
        """Of one step, averaged over so many; the counter moves every 100 ms or so."""
        if self._read is None:
            return None
        synchronize(device)
        before = self._read()
        for _ in range(count):
            step()
        synchronize(device)
        return (self._read() - before) / count


def release(device: torch.device) -> None:
    """Give what the allocator keeps back to the device."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
