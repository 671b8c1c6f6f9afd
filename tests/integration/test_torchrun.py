"""Several processes under torchrun: one that dies ends the job with its cause; an elastic restart goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from classification.digits import make_digits
from tests.classification.short_runs import ROOT, SHORT
from tests.integration.scenarios import differing

pytestmark = pytest.mark.slow
WAIT = 600  # seconds; of a machine that others use, too


class Job:
    """A training in two processes.

    Args:
        folder: Of results and log.
        data: Digits.
        restarts: That torchrun allows.
    """

    def __init__(self, folder: Path, data: Path, restarts: int, epochs: int = 3) -> None:
        self.run, self.log = folder / "run", folder / "log.txt"
        line = [*SHORT, "--epochs", str(epochs), "--batch-size", "4", "--recovery-interval", "1", "--resume", "auto"]
        script = ["classification/train.py", *line, "--data-dir", str(data), "--output", str(folder)]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--max-restarts={restarts}", "--standalone"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *script], cwd=ROOT, stdout=log, stderr=log, env=environment
            )

    def ranks(self) -> list[int]:
        """Process numbers of the training processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"classification/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def wait_for(self, name: str) -> None:
        """Until the run has written a file."""
        end = time.monotonic() + WAIT
        while not (self.run / name).exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Exit code and log."""
        return self.process.wait(WAIT), self.log.read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    if not Path("/proc/self/task").is_dir():
        pytest.skip("finds processes in /proc, as Linux has it")
    return make_digits(tmp_path_factory.mktemp("data") / "digits", size=32, limit=64)


def test_a_process_that_dies_ends_the_job_with_its_cause(data: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, data, restarts=0, epochs=50)
    job.wait_for("recovery.pth.tar")
    pid, start = job.ranks()[1], time.monotonic()
    os.kill(pid, signal.SIGKILL)
    code, log = job.end()
    (tmp_path / "seconds").write_text(str(time.monotonic() - start))
    assert code != 0
    assert f"exitcode  : -9 (pid: {pid})" in log
    assert "Signal 9 (SIGKILL)" in log


def test_an_elastic_restart_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert Job(tmp_path / "whole", data, restarts=0).end()[0] == 0
    job = Job(tmp_path / "killed", data, restarts=2)
    job.wait_for("recovery.pth.tar")
    os.kill(job.ranks()[1], signal.SIGKILL)
    code, log = job.end()
    assert code == 0, log
    assert "resumed from" in log
    found = [torch.load(tmp_path / name / "run" / "last.pth.tar", weights_only=True) for name in ("whole", "killed")]
    for key in ("state_dict", "optimizer", "scheduler", "epoch", "history"):
        assert differing(found[0][key], found[1][key]) == [], key


def test_sigterm_to_the_job_saves(data: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, data, restarts=0, epochs=500)
    job.wait_for("recovery.pth.tar")
    job.process.send_signal(signal.SIGTERM)
    code, log = job.end()
    assert code != 0
    assert "SIGTERM at batch" in log
    assert "saved in recovery.pth.tar" in log
    assert torch.load(tmp_path / "run" / "recovery.pth.tar", weights_only=True)["position"]["steps"] == 8
