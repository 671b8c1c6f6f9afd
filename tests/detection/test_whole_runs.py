"""Whole runs: train and test, in all precisions and of all kinds; two processes; MMDetection's own tools."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detection import quickstart
from detection import test as testing
from detection import train as training

from .conftest import ROOT, tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert training.main([str(tiny), "--work-dir", str(folder), "--tensorboard"]) == 0
    return folder


def test_leaves_everything_behind(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    (row,) = summary["validations"]
    figures = {key: value for key, value in row.items() if key.startswith("coco/")}
    assert {"coco/bbox_mAP", "coco/bbox_mAP_50", "coco/bbox_mAP_75"} <= figures.keys()
    assert all(-1 <= value <= 1 for value in figures.values())  # COCO's -1: no digit of that size
    assert 0 <= figures["coco/bbox_mAP"] <= figures["coco/bbox_mAP_50"]
    assert {key: summary[key] for key in figures} == figures  # what a right detector has: see test_evaluation.py
    assert summary["best_epoch"] == row["epoch"] == 2
    on_cpu = summary["memory"]["device"] == "cpu"
    assert summary["memory"]["step_peak_allocated_bytes" if on_cpu else "peak_allocated_bytes"] > 1e6
    assert Path(summary["checkpoint"]).is_file()
    assert (trained / "predictions.png").stat().st_size > 10_000
    assert (trained / "epoch_2.pth").is_file()
    assert list(trained.rglob("events.out.tfevents*"))


def test_tests(trained: Path, tiny: Path) -> None:
    checkpoint = str(trained / "epoch_2.pth")
    assert testing.main([str(tiny), checkpoint, "--work-dir", str(trained), "--classwise"]) == 0
    summary = json.loads((trained / "test" / "summary.json").read_text())
    assert summary["images"] == 2
    assert "coco/bbox_mAP" in summary
    assert (trained / "test" / "predictions.png").is_file()


@pytest.mark.parametrize("name", ["mask-rcnn_revbifpn-s0_digits", "retinanet_revbifpn-s0_digits"])
def test_other_detectors(name: str, scenes: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, scenes, name)
    assert training.main([str(config), "--work-dir", str(tmp_path / "run"), "--draw", "0"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert ("coco/segm_mAP" in summary) == name.startswith("mask")


def test_bf16(tiny: Path, tmp_path: Path) -> None:
    assert training.main([str(tiny), "--work-dir", str(tmp_path), "--draw", "0", "--amp"]) == 0


def test_fine_tunes_from_a_detector(trained: Path, tiny: Path, tmp_path: Path) -> None:
    options = [f"load_from={trained / 'epoch_2.pth'}", "train_cfg.max_epochs=1"]
    assert training.main([str(tiny), "--work-dir", str(tmp_path), "--draw", "0", "--cfg-options", *options]) == 0


def command(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", **more}
    return subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_two_processes(tiny: Path, tmp_path: Path) -> None:
    done = command(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29531",
        "detection/train.py", str(tiny), "--work-dir", str(tmp_path), "--draw", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 x cpu") == 1
    assert json.loads((tmp_path / "summary.json").read_text())["best_epoch"] == 2


def test_mmdetections_own_tools(tiny: Path, tmp_path: Path) -> None:
    """By `python -m revnets.mm`: tools/test.py imports operators before it reads the configuration that names us."""
    runs: list[list[Any]] = [
        ["train.py", tiny, "--work-dir", tmp_path],
        ["test.py", tiny, tmp_path / "epoch_2.pth", "--work-dir", tmp_path],
        ["analysis_tools/get_flops.py", tiny, "--num-images", "1"],
    ]
    for script, *arguments in runs:
        done = command("-m", "revnets.mm", script, *map(str, arguments))
        assert done.returncode == 0, done.stderr
    assert "Flops" in done.stdout
    assert "there is no script 'tets.py'" in command("-m", "revnets.mm", "tets.py").stderr


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1", "train_dataloader.batch_size=2"]
    line = ["--output", str(tmp_path / "run"), "--data-dir", str(tmp_path / "data"), "--scenes", "4"]
    assert quickstart.main([*line, "--cfg-options", *options]) == 0
    words = capsys.readouterr().out
    assert "AP50" in words
    assert "reversible mode" in words
    assert (tmp_path / "run" / "test" / "predictions.png").is_file()
