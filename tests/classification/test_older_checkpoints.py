"""Checkpoints of before the modules moved are validated and gone on from, with the figures of that time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from classification import train, validate
from classification.run.report import read_summary

from ..golden.older import assert_sizes, expected, unpacked

LINE = ["--model", "test_resnet", "--model-kwargs", "channels=[4,4,4,4]", "stem_width=4", "--layers", "sparse:0.5"]
LINE += ["--sparsity-schedule", "set", "--sparsity-interval", "2", "--img-size", "32", "--batch-size", "16"]
LINE += ["--workers", "0", "--device", "cpu", "--epochs", "2", "--warmup-epochs", "0", "--opt", "momentum"]
LINE += ["--lr", "0.05", "--seed", "1", "--model-ema", "--model-ema-decay", "0.5"]


@pytest.mark.parametrize(("name", "placed"), [("epoch", "last"), ("recovery", "recovery")])
def test_a_run_goes_on(name: str, placed: str, digits: Path, tmp_path: Path) -> None:
    unpacked(f"{name}.pth.tar", tmp_path / "run" / f"{placed}.pth.tar")
    line = [*LINE, "--data-dir", str(digits), "--output", str(tmp_path), "--experiment", "run", "--resume", "auto"]
    assert train.main(line) == 0
    (row,) = read_summary(tmp_path / "run" / "summary.csv")
    wanted = expected()
    assert {key: row[key] for key in wanted["summary"][1]} == pytest.approx(wanted["summary"][1], rel=1e-3)
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    assert_sizes(state["state_dict"], wanted["weights"])
    assert_sizes(state["state_dict_ema"], wanted["averaged"])


@pytest.mark.parametrize(("more", "key"), [([], "eval_raw_loss"), (["--use-ema"], "eval_loss")])
def test_weights_are_validated(more: list[str], key: str, digits: Path, tmp_path: Path) -> None:
    path = unpacked("epoch.pth.tar", tmp_path / "epoch.pth.tar")
    figures = validate.validate(["--checkpoint", str(path), "--data-dir", str(digits), *more])
    assert figures["loss"] == pytest.approx(expected()["summary"][0][key], rel=1e-4)
