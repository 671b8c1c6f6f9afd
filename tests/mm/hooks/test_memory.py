"""What MemoryReportHook measures and writes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from revnets.mm import MemoryReportHook  # noqa: E402


def train(hook: MemoryReportHook, runner: Any, stopped: bool = False) -> None:
    hook.before_train(runner)
    for index in range(2):
        hook.before_train_iter(runner, index)
        torch.ones(1000)
        if stopped:
            return
        hook.after_train_iter(runner, index)
    hook.after_train(runner)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_the_memory_of_a_step_is_written(tmp_path: Path) -> None:
    hook, runner = MemoryReportHook(step=0), SimpleNamespace(logger=MagicMock(), rank=0, work_dir=str(tmp_path))
    train(hook, runner, stopped=True)  # leaves the profiler open
    train(hook, runner)
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found == hook.report == {"device": "cpu", "step_peak_allocated_bytes": 4000}
