"""Training from end to end on a few dozen digits."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from classification import train
from classification.run.report import read_summary
from revnets.numerics.report import read_table

from .short_runs import SHORT, Trainer


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two checkpoints are not equal to the bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys"]
        return [d for key in a for d in differing(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differing(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def test_files_of_a_run(trained: Path) -> None:
    names = {file.name for file in trained.iterdir()}
    assert names >= {"summary.csv", "args.yaml", "curves.png", "last.pth.tar", "model_best.pth.tar"}
    assert not [name for name in names if name.startswith((".tmp", "tmp"))]
    rows = read_summary(trained / "summary.csv")
    assert [row["epoch"] for row in rows] == [0, 1]
    columns = {"train_loss", "train_images_per_s", "train_peak_rss_mb", "eval_loss", "eval_top1", "eval_raw_top1", "lr"}
    assert columns <= rows[0].keys()
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    args = yaml.safe_load((trained / "args.yaml").read_text())
    assert args["num_classes"] == 10
    assert args["model_kwargs"] == {"act_layer": "relu"}


def test_a_folder_may_have_any_name(run_train: Trainer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need it")
    name = "$\\frac$"  # a formula to matplotlib; odd characters: tests/training/test_pictures.py
    assert run_train("--epochs", "1", "--experiment", name) == 0
    assert (tmp_path / name / "curves.png").stat().st_size > 0


def test_checkpoint_holds_plain_values_and_what_timm_expects(trained: Path) -> None:
    checkpoint = load(trained / "last.pth.tar")
    assert checkpoint["epoch"] == 1
    assert checkpoint["arch"] == "test_efficientnet"
    assert checkpoint["args"]["epochs"] == 2
    assert {"state_dict", "state_dict_ema", "optimizer", "scheduler", "metric"} <= checkpoint.keys()
    import timm

    model = timm.create_model("test_efficientnet", num_classes=10, act_layer="relu")
    timm.models.load_checkpoint(model, str(trained / "last.pth.tar"))  # strict, takes the EMA


def test_options_file_of_a_run_repeats_it(trained: Path, tmp_path: Path) -> None:
    assert train.main(["--config", str(trained / "args.yaml"), "--output", str(tmp_path)]) == 0
    again, first = load(tmp_path / "run" / "last.pth.tar"), load(trained / "last.pth.tar")
    assert not differing(again["state_dict"], first["state_dict"])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_resumed_run_equals_uninterrupted_run_to_the_bit(
    run_train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    random = ["--drop", "0.2", "--drop-path", "0.1", "--reprob", "0.5", "--mixup", "0.2", "--aa", "rand-m5-mstd0.5"]
    line = ["--epochs", "3", "--model-ema", "--model-ema-decay", "0.9", "--workers", workers, *random]
    assert run_train(*line, "--experiment", "whole") == 0

    def interrupted(run: Any, begin: Any) -> Any:
        if begin.epoch == 2:
            raise KeyboardInterrupt
        return real(run, begin)

    real = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", interrupted)
    assert run_train(*line, "--experiment", "parts") == 130
    monkeypatch.setattr(train, "train_epoch", real)
    assert len(read_summary(tmp_path / "parts" / "summary.csv")) == 2
    assert run_train(*line, "--experiment", "parts", "--resume", "auto") == 0

    whole, parts = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "parts"))
    for key in ("state_dict", "state_dict_ema", "optimizer", "scheduler", "metric", "history"):
        assert not differing(whole[key], parts[key]), key
    exact = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_raw_loss", "lr")
    tables = [read_summary(tmp_path / name / "summary.csv") for name in ("whole", "parts")]
    assert [[row[c] for c in exact] for row in tables[0]] == [[row[c] for c in exact] for row in tables[1]]


def test_resume_auto_starts_fresh_where_there_is_nothing_and_stops_where_all_is_done(
    run_train: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert run_train("--epochs", "1", "--resume", "auto") == 0
        assert "starting from the beginning" in caplog.text
        assert run_train("--epochs", "1", "--resume", "auto") == 0
        assert "already trained" in caplog.text
    assert run_train("--epochs", "2", "--resume", "auto") == 0
    assert [row["epoch"] for row in read_summary(tmp_path / "run" / "summary.csv")] == [0, 1]


def test_a_run_is_not_written_over_by_accident(
    trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "summary.csv").read_bytes()
    line = [*SHORT, "--epochs", "1", "--data-dir", str(digits), "--output", str(tmp_path)]
    assert train.main(line) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.csv").read_bytes() == before
    assert train.main([*line, "--overwrite"]) == 0
    assert len(read_summary(tmp_path / "run" / "summary.csv")) == 1
    unnamed = [*line, "--experiment", ""]
    assert train.main(unnamed) == 0
    assert train.main(unnamed) == 0
    assert {"test_efficientnet-32", "test_efficientnet-32-1"} <= {each.name for each in tmp_path.iterdir()}


def test_gradient_accumulation_equals_the_large_batch(run_train: Trainer, tmp_path: Path) -> None:
    plain = ["--no-aug", "--epochs", "1", "--opt", "sgd", "--lr", "0.1", "--model", "test_convnext", "--smoothing", "0"]
    assert run_train(*plain, "--batch-size", "32", "--experiment", "large") == 0
    assert run_train(*plain, "--batch-size", "16", "--grad-accum-steps", "2", "--experiment", "parts") == 0
    large, parts = (load(tmp_path / name / "last.pth.tar")["state_dict"] for name in ("large", "parts"))
    for key, value in large.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        ["--amp", "--channels-last", "--clip-grad", "1", "--sched-on-updates"],
        ["--amp", "--amp-dtype", "float16"],
        ["--aug-splits", "2", "--jsd-loss", "--aa", "augmix-m3-w2"],
        ["--mixup", "0.2", "--cutmix", "1", "--no-prefetcher", "--bce-loss", "--mixup-off-epoch", "1"],
        ["--epoch-repeats", "2", "--clip-grad", "0.01", "--clip-mode", "agc", "--grad-accum-steps", "3"],
        ["--sched", "plateau", "--eval-metric", "loss", "--val-interval", "2", "--epochs", "3"],
        ["--in-chans", "1", "--mean", "0.5", "--std", "0.5", "--layer-decay", "0.9", "--opt", "lamb"],
        ["--grad-checkpointing", "--model-ema", "--model-ema-force-cpu", "--sched", "none"],
    ],
    ids=lambda more: more[0][2:],
)
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_combinations_of_options_train(run_train: Trainer, tmp_path: Path, more: list[str]) -> None:
    assert run_train("--epochs", "1", *more) == 0
    rows = read_summary(tmp_path / "run" / "summary.csv")
    assert "eval_top1" in rows[-1]


def test_without_matplotlib_the_run_ends_well(
    run_train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.INFO):
        assert run_train("--epochs", "1") == 0
    assert "matplotlib is not installed" in caplog.text
    assert not (tmp_path / "run" / "curves.png").exists()


def test_only_the_best_checkpoints_stay(run_train: Trainer, tmp_path: Path) -> None:
    assert run_train("--epochs", "4", "--checkpoint-hist", "2", "--eval-metric", "loss") == 0
    numbered = {int(file.name.split("-")[1].split(".")[0]) for file in (tmp_path / "run").glob("checkpoint-*.pth.tar")}
    losses = {int(row["epoch"]): row["eval_loss"] for row in read_summary(tmp_path / "run" / "summary.csv")}
    assert numbered == set(sorted(losses, key=losses.__getitem__)[:2])
    assert load(tmp_path / "run" / "model_best.pth.tar")["epoch"] == min(losses, key=losses.__getitem__)


def test_initial_checkpoint(run_train: Trainer, trained: Path, tmp_path: Path) -> None:
    start = ["--initial-checkpoint", str(trained / "last.pth.tar"), "--model-kwargs", "act_layer=relu"]
    assert run_train(*start, "--epochs", "1", "--lr", "0", "--sched", "none") == 0
    weights = load(tmp_path / "run" / "last.pth.tar")["state_dict"]
    ema = load(trained / "last.pth.tar")["state_dict_ema"]
    assert torch.equal(weights["conv_stem.weight"], ema["conv_stem.weight"])


def test_numerics_of_a_run(run_train: Trainer, tmp_path: Path) -> None:
    assert run_train("--epochs", "1", "--numerics-interval", "3", "--grad-checkpointing") == 0
    assert {r["step"] for r in read_table(tmp_path / "run")} == {0, 3}
    assert (tmp_path / "run" / "numerics.png").exists()
