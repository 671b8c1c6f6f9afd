"""Hooks for MMEngine's runner: how much memory training took."""

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...profiling.memory import CpuAllocations
from ...training.files import write_json

MB = 1e6


@HOOKS.register_module()
class MemoryReportHook(Hook):
    """Measures the memory of training and reports it at the end, in the log and in ``memory.json`` in the work folder.

    On an accelerator: the most bytes allocated by tensors over the whole run, and the most that the allocator reserved.
    On a CPU: the most bytes that one step allocates beyond what is there before it, by torch's profiler, in the
    step numbered ``step`` (the profiler slows that step down).

    Args:
        step: of the run, counted from 0, that is measured on a CPU.

    Example:
        >>> MemoryReportHook(step=3)  # in a config: custom_hooks=[dict(type="MemoryReportHook")]
        MemoryReportHook(step=3)
    """

    priority = "LOWEST"  # after the optimizer

    def __init__(self, step: int = 2) -> None:
        self.step = step
        self.report: dict[str, Any] = {}
        self._steps = 0
        self._allocations: CpuAllocations | None = None

    def before_train(self, runner: Any) -> None:
        """Start counting."""
        self._steps = 0
        if self._allocations is not None:  # of a run that was stopped in the step that was watched
            self._allocations.__exit__(None, None, None)
            self._allocations = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """On a CPU, watch the step that was chosen."""
        if self._steps == self.step and not torch.cuda.is_available():
            self._allocations = CpuAllocations()
            self._allocations.__enter__()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """End watching."""
        self._steps += 1
        if self._allocations is not None:
            self._allocations.__exit__(None, None, None)
            self.report = {"device": "cpu", "step_peak_allocated_bytes": self._allocations.peak}
            self._allocations = None
            runner.logger.info(f"memory of one step, beyond the weights: {self._words()}")

    def after_train(self, runner: Any) -> None:
        """Report."""
        if torch.cuda.is_available():
            self.report = {
                "device": torch.cuda.get_device_name(),
                "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            }
        if not self.report:
            return
        runner.logger.info(f"memory: {self._words()}")
        if runner.rank == 0:
            write_json(Path(runner.work_dir) / "memory.json", self.report)

    def _words(self) -> str:
        return ", ".join(
            f"{key.removesuffix('_bytes').replace('_', ' ')} {value / MB:.1f} MB"
            for key, value in self.report.items()
            if key.endswith("_bytes")
        )

    def __repr__(self) -> str:
        return f"MemoryReportHook(step={self.step})"
