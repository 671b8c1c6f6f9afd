"""`--memory-budget`: a training within so many bytes is the training that it would be without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from classification.run.report import read_summary

from ..short_runs import Trainer


def test_the_same_training_in_fewer_bytes(run_train: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run_train("--epochs", "1", "--experiment", "plain") == 0
    assert run_train("--epochs", "1", "--experiment", "small", "--memory-budget", "5MB") == 0
    assert re.search(r"peak 4\.\d of 5\.0 MB, plain 5\.\d MB", caplog.text)
    plain, small = (read_summary(tmp_path / name / "summary.csv")[-1] for name in ("plain", "small"))
    assert small["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    files = [next((tmp_path / name).glob("last*")) for name in ("plain", "small")]
    weights = [torch.load(file, weights_only=False)["state_dict"] for file in files]
    assert weights[0].keys() == weights[1].keys()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--memory-budget", "1KB"], ["--memory-budget", "needs at least", "1,000"]),
        (["--memory-budget", "7 parsecs"], ["--memory-budget", "7 parsecs", "24GB"]),
        (["--memory-budget", "1GB", "--grad-checkpointing"], ["--memory-budget", "--grad-checkpointing"]),
    ],
    ids=["too small", "unit", "checkpointing"],
)
def test_mistakes(
    run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: list[str]
) -> None:
    assert run_train(*more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.iterdir())
