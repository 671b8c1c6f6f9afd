"""Sparse layers in training: masks through resume, validation and files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import train, validate
from classification.networks.models import build_model
from classification.networks.sparse import RunFlops, start_sparsity
from classification.options import TrainOptions
from classification.run.report import read_summary
from revnets.kernels import kernel_problem
from revnets.layers import count_costs
from revnets.layers.sparse_ift import sparse
from revnets.sparsity import sparse_layers
from revnets.training.errors import UserError
from revnets.training.options.parsing import parse

from .short_runs import Trainer
from .test_train_run import differing, load

SPARSE = ["--layers", "sparse_parallel:0.75", "--sparsity-interval", "2", "--batch-size", "8"]
EMA = ["--model-ema", "--model-ema-decay", "0.5"]


def masks(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: mask for name, mask in weights.items() if name.endswith(".mask")}


@pytest.mark.parametrize("schedule", ["rigl", pytest.param("set", marks=pytest.mark.slow)])
def test_resumed_run_equals_uninterrupted_run_to_the_bit(
    run_train: Trainer, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    line = [*SPARSE, *EMA, "--epochs", "3", "--sparsity-schedule", schedule, "--sparsity-distribution", "erk"]
    assert run_train(*line, "--experiment", "whole") == 0

    def interrupted(run: Any, begin: Any) -> Any:
        if begin.epoch == 2:
            raise KeyboardInterrupt
        return real(run, begin)

    real = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", interrupted)
    assert run_train(*line, "--experiment", "parts") == 130
    monkeypatch.setattr(train, "train_epoch", real)
    assert run_train(*line, "--experiment", "parts", "--resume", "auto") == 0
    whole, parts = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "parts"))
    for key in ("state_dict", "state_dict_ema", "optimizer", "sparsity", "metric"):
        assert not differing(whole[key], parts[key]), key
    for name in ("sparsity.csv", "sparsity.png", "flops.csv", "flops.json", "flops.png", "summary.csv"):
        assert (tmp_path / "parts" / name).exists()
    assert (tmp_path / "whole" / "sparsity.csv").read_bytes() == (tmp_path / "parts" / "sparsity.csv").read_bytes()

    steps = [int(t) for t in whole["sparsity"]["history"]["step"]]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16]  # of 24, up to 0.75
    for weights in (whole["state_dict"], whole["state_dict_ema"]):
        assert masks(weights)
        for name, mask in masks(weights).items():
            assert torch.equal(mask, whole["state_dict"][name])
            assert not weights[name.removesuffix("mask") + "weight"][~mask].any()

    checkpoint = tmp_path / "parts" / "last.pth.tar"
    figures = validate.validate(["--checkpoint", str(checkpoint), "--data-dir", str(digits), "--use-ema"])
    assert figures["top1"] == read_summary(tmp_path / "parts" / "summary.csv")[-1]["eval_top1"]


def test_summary_tells_the_flops_of_the_schedule(run_train: Trainer, tmp_path: Path) -> None:
    found = {}
    for name in ("dense", "static", "rigl"):
        layers = [] if name == "dense" else [*SPARSE[: 4 if name == "rigl" else 2], "--sparsity-schedule", name]
        assert run_train(*layers, "--batch-size", "8", "--epochs", "1", "--experiment", name) == 0
        found[name] = read_summary(tmp_path / name / "summary.csv")[-1]["train_flops"]
    costs = count_costs(built("--model", "test_efficientnet", *SPARSE[:2]), (3, 32, 32))
    assert found["static"] == 3 * costs.sparse_flops * 64
    assert found["static"] == pytest.approx(found["dense"], rel=2e-3)
    assert found["rigl"] == found["static"] + (costs.flops - costs.sparse_flops) * 8 * 2  # updates 2 and 4 of 8
    with (tmp_path / "rigl" / "sparsity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"0", "2", "4"}
    assert all(abs(float(row["density"]) - 0.25) * int(row["weights"]) <= 0.5 for row in rows)
    assert sum(int(row["changed"]) for row in rows) > 0


@pytest.mark.skipif(kernel_problem() is not None, reason=f"no kernel: {kernel_problem()}")
def test_sparse_kernel(run_train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training as without it, but for the last bits; resumed, the same to the bit."""
    monkeypatch.setattr(sparse, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(sparse, "pays", lambda *args, **more: True)
    line = ["--layers", "sparse:0.75", "--sparsity-interval", "2", "--batch-size", "8", "--sparsity-schedule", "rigl"]
    line += ["--epochs", "2"]
    assert run_train(*line, "--experiment", "masked") == 0
    assert run_train(*line, "--sparse-kernel", "--experiment", "kernel") == 0

    def interrupted(run: Any, begin: Any) -> Any:
        if begin.epoch == 1:
            raise KeyboardInterrupt
        return real(run, begin)

    real = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", interrupted)
    assert run_train(*line, "--sparse-kernel", "--experiment", "parts") == 130
    monkeypatch.setattr(train, "train_epoch", real)
    assert run_train(*line, "--sparse-kernel", "--experiment", "parts", "--resume", "auto") == 0
    masked, kernel, parts = (load(tmp_path / name / "last.pth.tar") for name in ("masked", "kernel", "parts"))
    assert not differing(kernel["state_dict"], parts["state_dict"])
    assert differing(kernel["state_dict"], masked["state_dict"])  # the kernel has computed
    losses = [read_summary(tmp_path / name / "summary.csv")[0]["train_loss"] for name in ("masked", "kernel")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def built(*line: str) -> torch.nn.Module:
    return build_model(parse(TrainOptions, ["--data-dir", "x", "--num-classes", "10", *line], ""))


def test_flops_are_met_at_the_size_of_the_run() -> None:
    line = ["--model", "test_revbifpn", "--img-size", "32"]
    dense = count_costs(built(*line), (3, 32, 32)).flops
    sparse = count_costs(built(*line, "--layers", "sparse_wide:0.75"), (3, 32, 32)).sparse_flops
    assert sparse == pytest.approx(dense, rel=2e-3)


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "store"])
def test_recomputation_is_counted(mode: str) -> None:
    model = built("--model", "test_revbifpn", "--model-kwargs", f"mode={mode}", "--layers", "sparse_parallel:0.75")
    costs, images, updates = count_costs(model, (3, 32, 32)), 8, 5
    row = RunFlops(model, (3, 32, 32), None, images).after(updates)
    forward = costs.sparse_flops * images * updates
    assert row["train_flops"] == 3 * forward + row["train_flops_recomputed"]
    expected = 0 if mode == "store" else forward  # all but the classifier
    assert row["train_flops_recomputed"] == pytest.approx(expected, rel=0.02)


def test_layers_that_would_throw_pretrained_weights_away(tmp_path: Path) -> None:
    plain = built("--model", "test_efficientnet")
    path = tmp_path / "net.pth"
    torch.save(plain.state_dict(), path)
    line = ["--model", "test_efficientnet", "--pretrained-path", str(path), "--layers"]
    with pytest.raises(UserError, match="sparse_doped are newly initialised"):
        built(*line, "sparse_doped:0.75")
    sparse, weights = built(*line, "sparse:0.75"), plain.state_dict()
    assert sparse_layers(sparse)
    for layer in sparse_layers(sparse):
        assert torch.equal(layer.weight, weights[layer.name + ".weight"] * layer.mask)


def test_distribution_tells_the_flops(caplog: pytest.LogCaptureFixture) -> None:
    line = ["--data-dir", "x", "--model", "test_efficientnet", "--img-size", "32", "--layers", "sparse_parallel:0.75"]
    options = parse(TrainOptions, [*line, "--sparsity-distribution", "erk"], "")
    model = build_model(options)
    before = count_costs(model, (3, 32, 32)).sparse_flops
    with caplog.at_level("INFO"):
        start_sparsity(options, model, torch.optim.SGD(model.parameters()), 8)
    after = count_costs(model, (3, 32, 32)).sparse_flops
    assert after != before
    assert f"{before / 1e6:.2f} before, {after / 1e6:.2f} after" in caplog.text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sparsity-schedule", "rigl"], ["--sparsity-schedule", "no sparse layers", "--layers"]),
        ([*SPARSE, "--sparsity-schedule", "rigl", "--sparsity-start", "0.9"], ["end=0.75", "before they start"]),
        (["--layers", "sparse_paralel:0.75"], ["--layers", "sparse_paralel", "sparse_parallel"]),
        (["--layers", "sparse_parallel:1.5"], ["--layers", "1.5"]),
        (["--sparsity-schedule", "magic"], ["--sparsity-schedule", "magic", "rigl"]),
    ],
)
def test_mistakes_write_nothing(
    run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: list[str]
) -> None:
    assert run_train(*more) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    assert all(word in message[0] for word in words), message
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_other_masks(run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(*SPARSE, "--epochs", "1", "--sparsity-schedule", "rigl") == 0
    resumed = ["--resume", str(tmp_path / "run" / "last.pth.tar"), "--experiment", "other"]
    capsys.readouterr()
    for more, words in (
        ([], "--layers"),
        (["--layers", "sparse_parallel:0.5"], "--layers"),
        ([*SPARSE, "--sparsity-schedule", "set"], "trained with 'rigl'"),
        ([*SPARSE, "--sparsity-schedule", "rigl", "--sparsity-distribution", "erk"], "same layers= and distribution"),
    ):
        assert run_train(*more, *resumed) == 2
        assert words in capsys.readouterr().err
    path = tmp_path / "run" / "last.pth.tar"
    checkpoint = load(path)
    del checkpoint["sparsity"]
    torch.save(checkpoint, path)
    assert run_train(*SPARSE, "--sparsity-schedule", "rigl", *resumed) == 2
    assert "says nothing of the schedule of its masks" in capsys.readouterr().err
