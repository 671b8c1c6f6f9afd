"""Training and validation in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from classification import validate
from classification.report import read_summary

from .short_runs import ROOT, SHORT


def torchrun(*line: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *line]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_processes_train_and_resume(digits: Path, tmp_path: Path) -> None:
    line = ["classification/train.py", *SHORT, "--data-dir", str(digits), "--output", str(tmp_path), "--resume", "auto"]
    for epochs in ("1", "2"):
        done = torchrun(*line, "--epochs", epochs, "--model-ema", "--grad-accum-steps", "2", "--batch-size", "8")
        assert done.returncode == 0, done.stderr
    rows = read_summary(tmp_path / "run" / "summary.csv")
    assert [row["epoch"] for row in rows] == [0, 1]
    last = str(tmp_path / "run" / "last.pth.tar")
    figures = validate.validate(["--checkpoint", last, "--data-dir", str(digits), "--batch-size", "7"])
    assert figures["top1"] == rows[-1]["eval_raw_top1"]  # 64 images: each counted once, whoever saw it
    assert figures["loss"] == pytest.approx(rows[-1]["eval_raw_loss"], rel=1e-5)
