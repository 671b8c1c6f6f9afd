"""Training and validation in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from classification import validate
from classification.run.report import read_summary

from .short_runs import ROOT, SHORT
from .test_train_run import differing, load


def torchrun(*line: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *line]
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


WATCHED = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
from classification import train
from revnets.sparsity import sparse_layers

folder, stop, *line = sys.argv[1:]

def watched(run, begin):
    epoch = begin.epoch
    if epoch == int(stop):
        raise KeyboardInterrupt
    found = real(run, begin)
    masks = [[layer.mask for layer in sparse_layers(model)] for model in (run.model, run.ema.module)]
    torch.save(masks, f"{folder}/{epoch}-{run.runtime.rank}.pt")
    return found

real, train.train_epoch = train.train_epoch, watched
sys.exit(train.main(line))
"""


@pytest.mark.slow
def test_masks_in_two_processes(digits: Path, tmp_path: Path) -> None:
    """With EMA and accumulated batches: the same masks everywhere at any time, and a resumed run is the same run."""
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    line = [*SHORT, "--data-dir", str(digits), "--output", str(tmp_path), "--epochs", "3", "--batch-size", "4"]
    line += ["--layers", "sparse_parallel:0.75", "--sparsity-schedule", "rigl", "--sparsity-interval", "2"]
    line += ["--model-ema", "--model-ema-decay", "0.5", "--grad-accum-steps", "2", "--amp", "--amp-dtype", "bfloat16"]

    def run(folder: Path, stop: int) -> int:
        folder.mkdir(exist_ok=True)
        more = ["--experiment", folder.name, "--resume", "auto"]
        done = torchrun(str(script), str(folder), str(stop), *line, *more)
        assert done.returncode == 0 or stop < 3, done.stderr
        return done.returncode

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, 9) == 0
    assert run(parts, 2) != 0
    assert run(parts, 9) == 0
    seen = []
    for epoch in range(3):
        found = [torch.load(each / f"{epoch}-{rank}.pt") for each in (whole, parts) for rank in (0, 1)]
        first = found[0][0]
        assert all(len(masks) == len(first) > 0 for both in found for masks in both)
        assert all(torch.equal(a, b) for both in found for masks in both for a, b in zip(first, masks, strict=True))
        seen.append(torch.cat([mask.flatten() for mask in first]))
    assert not torch.equal(seen[0], seen[1])
    a, b = (load(each / "last.pth.tar") for each in (whole, parts))
    for key in ("state_dict", "state_dict_ema", "optimizer", "sparsity", "metric"):
        assert not differing(a[key], b[key]), key
    assert [int(step) for step in a["sparsity"]["history"]["step"]] == [2, 4, 6, 8]  # of 12, up to 0.75
