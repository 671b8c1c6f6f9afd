"""How much memory a run took at most, and how much there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import torch

MB = 1e6
MODES = ("reversible", "store")  # that the quickstarts compare


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak where the device can; the peak RSS of a process only ever rises."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in MB (1e6 bytes), each number under the name of what it is.

    Args:
        device: CUDA gives `max_memory_allocated` (tensors) and `max_memory_reserved` (what the allocator holds).
            Others give `peak_rss`, the largest resident memory of this process, libraries and data included.
    """
    if device.type == "cuda":
        return {
            "max_memory_allocated_mb": torch.cuda.max_memory_allocated(device) / MB,
            "max_memory_reserved_mb": torch.cuda.max_memory_reserved(device) / MB,
        }
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB}


def physical_memory(device: torch.device) -> int | None:
    """All bytes of a device's memory, used or not; None where they are not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_words(memory: dict[str, float]) -> str:
    """Peak memory for the log."""
    return ", ".join(f"{name.removesuffix('_mb').replace('_', ' ')} {value:,.0f} MB" for name, value in memory.items())


def peaks(activations: Mapping[str, int]) -> str:
    """What reversible parts save, in the words of a quickstart.

    Args:
        activations: Peak of their bytes in each of `MODES`.

    Example:
        >>> peaks({"reversible": 1_000_000, "store": 4_000_000})
        'peak at 1.0 MB in reversible mode and 4.0 MB when stored, 4.0 times as much'
    """
    reversible, store = (activations[mode] / MB for mode in MODES)
    ratio = store / reversible
    return f"peak at {reversible:.1f} MB in reversible mode and {store:.1f} MB when stored, {ratio:.1f} times as much"
