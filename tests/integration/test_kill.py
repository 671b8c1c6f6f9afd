"""A few kills; the command for many is in `kill.py`."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .kill import Harness
from .scenarios import Scenario, classification, detection, differing, float16


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [classification, detection, float16], ids=lambda make: make.__name__)
def test_killed_runs_end_as_the_one_that_was_let_be(scenario: Callable[[Path], Scenario], tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    if scenario is detection:
        pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    harness = Harness(scenario(tmp_path / "data"), tmp_path / "kills", seed=1)
    harness.run(3)
    assert len(harness.kills) == 3
    assert harness.differences == []


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    """Of runs that are never started."""
    return Harness(Scenario("none", lambda folder: [], "*.tmp", lambda a, b: []), tmp_path, limit=0.05)


def test_a_round_without_a_kill_is_followed_by_other_moments(harness: Harness) -> None:
    assert len({harness._moment(10, number)[1] for number in range(20)}) == 20
    assert harness._moment(10, 3) == harness._moment(10, 3)


def test_a_run_that_hangs_is_ended(harness: Harness, tmp_path: Path) -> None:
    waits = (lambda pid: harness._wait(pid), lambda pid: harness._kill(pid, tmp_path, 0.01, True))
    for wait in waits:
        process = subprocess.Popen(["sleep", "600"])
        with pytest.raises(TimeoutError, match=r"none did not end within 0.05 s: see .*log.txt"):
            wait(process.pid)
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
        process.poll()


def test_differences_are_found() -> None:
    import torch

    one = {"a": [torch.zeros(2), 1], "b": {"c": 2.0}}
    assert differing(one, {"a": [torch.zeros(2), 1], "b": {"c": 2.0}}) == []
    assert differing(one, {"a": [torch.tensor([0.0, 1e-40]), 2], "b": {}}) == ["/a/0", "/a/1", "/b: keys"]
