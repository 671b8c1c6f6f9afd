"""Validation agrees with what training reported, and works for any timm model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import timm
import torch

from classification import validate
from classification.images.data import check_same_classes, class_names, open_dataset
from classification.networks.models import build_model
from classification.options import TrainOptions, as_dict
from classification.run.report import read_summary
from revnets.training.options.parsing import parse

from .short_runs import ROOT, TINY


@pytest.mark.parametrize(("more", "column"), [([], "eval_raw_top1"), (["--use-ema"], "eval_top1")])
def test_checkpoint_gives_the_reported_figures(trained: Path, digits: Path, more: list[str], column: str) -> None:
    figures = validate.validate(["--checkpoint", str(trained / "last.pth.tar"), "--data-dir", str(digits), *more])
    row = read_summary(trained / "summary.csv")[-1]
    assert figures["top1"] == row[column]
    assert figures["loss"] == pytest.approx(row[column.replace("top1", "loss")], rel=1e-6)
    assert figures["images"] == 64


def test_results_files(trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--checkpoint", str(trained / "last.pth.tar"), "--data-dir", str(digits), "--batch-size", "24"]
    assert validate.main([*line, "--results-file", str(tmp_path / "new" / "r.json")]) == 0
    assert validate.main([*line, "--results-file", str(tmp_path / "r.csv")]) == 0
    assert "top1" in capsys.readouterr().out
    from_json = json.loads((tmp_path / "new" / "r.json").read_text())
    with (tmp_path / "r.csv").open() as file:
        (from_csv,) = csv.DictReader(file)
    assert float(from_csv["top1"]) == from_json["top1"]
    assert from_json["images"] == 64


def test_training_configuration_can_be_given(trained: Path, digits: Path) -> None:
    line = ["--config", str(trained / "args.yaml"), "--checkpoint", str(trained / "last.pth.tar")]
    assert validate.main([*line, "--data-dir", str(digits)]) == 0


def test_model_without_checkpoint(digits: Path) -> None:
    assert validate.main([*TINY, "--model", "test_resnet", "--num-classes", "10", "--data-dir", str(digits)]) == 0


def test_other_size_than_that_of_the_conversion(digits: Path, tmp_path: Path) -> None:
    line = [*TINY, "--model", "test_resnet", "--num-classes", "10", "--layers", "sparse_wide:0.75"]
    options = parse(TrainOptions, [*line, "--data-dir", str(digits)], "")
    torch.save({"state_dict": build_model(options).state_dict(), "args": as_dict(options)}, tmp_path / "net.pth")
    line = ["--checkpoint", str(tmp_path / "net.pth"), "--data-dir", str(digits), "--img-size", "160"]
    assert validate.validate(line)["img_size"] == 160


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--use-ema"], "--use-ema"),
        (["--results-file", "r.txt"], "r.txt"),
        (["--lr", "1"], "--lr"),
        (["--num-classes", "3"], "--num-classes"),
    ],
)
def test_mistakes(digits: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    assert validate.main([*TINY, "--data-dir", str(digits), *more]) == 2
    assert words in capsys.readouterr().err


def test_checkpoint_of_another_model(trained: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--checkpoint", str(trained / "last.pth.tar"), "--data-dir", str(digits), "--model", "test_resnet"]
    assert validate.main([*line, "--img-size", "32"]) == 2
    assert "another model than test_resnet" in capsys.readouterr().err


def test_tar_files_are_read_as_splits(tmp_path: Path) -> None:
    data = ROOT.parent / "shared" / "data" / "cifar10"
    if not data.is_dir():
        pytest.skip(f"no CIFAR-10 at {data}: the reading of .tar splits is not tested")
    line = ["--config", str(ROOT / "configs" / "classification" / "cifar10.yaml"), "--data-dir", str(data)]
    options = parse(TrainOptions, line, "")
    train_set = open_dataset(options, options.train_split, training=True)
    val_set = open_dataset(options, options.val_split, training=False)
    check_same_classes(train_set, val_set)
    assert (len(train_set), len(val_set)) == (50_000, 10_000)
    assert class_names(train_set)[0] == "airplane"  # type: ignore[index]


def test_weights_in_a_published_layout_are_renamed(
    trained: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = torch.load(trained / "last.pth.tar", weights_only=True)
    checkpoint["state_dict"] = {"old." + key: value for key, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "old.pth.tar")

    def rename(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {key.removeprefix("old."): value for key, value in weights.items()}

    monkeypatch.setattr(timm.models.efficientnet, "checkpoint_filter_fn", rename, raising=False)
    figures = validate.validate(["--checkpoint", str(tmp_path / "old.pth.tar"), "--data-dir", str(digits)])
    assert figures["top1"] == read_summary(trained / "summary.csv")[-1]["eval_raw_top1"]
