"""The sparse life cycle in train.py: zeros that stay, a teacher, dense fine-tuning of a sparse pre-training; tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from classification import train, validate
from classification.options import TrainOptions, ValidateOptions
from classification.run.report import read_summary
from revnets.layers import count_costs
from revnets.pruning import densify, prune
from revnets.training.options.parsing import options_of, parse, read_layers

from .short_runs import ROOT, Trainer
from .test_train_errors import sentence
from .test_train_run import differing, load

RECIPES = sorted((ROOT / "configs" / "classification" / "prune").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(("# python ", "# torchrun "))
    assert path.name in lines[0]
    parse(TrainOptions, ["--config", str(path), "--data-dir", "x"], "").check()
    trained_only = frozenset(set(options_of(TrainOptions)) - set(options_of(ValidateOptions)))
    read_layers(ValidateOptions, ["--config", str(path)], "", ignored=trained_only)


def pruned(folder: Path, classes: int = 10) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=classes)
    report = prune(model, torch.randn(8, 3, 32, 32), sparsity=0.7, method="magnitude", recalibrate=False, max_passes=1)
    torch.save(report.model.state_dict(), folder / "pruned.pth")
    return folder / "pruned.pth"


def zeros(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: w == 0 for name, w in weights.items() if w.dim() > 1 and bool((w == 0).any())}


def test_zeros_stay_in_training_and_resume(
    run_train: Trainer, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = pruned(tmp_path)
    line = ["--initial-checkpoint", str(start), "--keep-zeros", "--model-ema", "--model-ema-decay", "0.5"]
    assert run_train(*line, "--experiment", "whole") == 0
    real = train.train_epoch

    def interrupted(run: Any, begin: Any) -> Any:
        if begin.epoch == 1:
            raise KeyboardInterrupt
        return real(run, begin)

    monkeypatch.setattr(train, "train_epoch", interrupted)
    assert run_train(*line, "--experiment", "parts") == 130
    monkeypatch.setattr(train, "train_epoch", real)
    assert run_train(*line, "--experiment", "parts", "--resume", "auto") == 0
    whole, parts = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "parts"))
    before = torch.load(start, weights_only=True)
    assert zeros(before)
    for key in ("state_dict", "state_dict_ema"):
        assert not differing(whole[key], parts[key])
        assert set(whole[key]) == set(before)
        for name, mask in zeros(before).items():
            assert torch.equal(whole[key][name] == 0, mask), name
    plain = timm.create_model("test_efficientnet", num_classes=10)
    plain.load_state_dict(whole["state_dict"])  # torch's own layers
    report = prune(plain, torch.randn(2, 3, 32, 32), sparsity=0.0, method="magnitude", max_passes=1, recalibrate=False)
    row = read_summary(tmp_path / "whole" / "summary.csv")[-1]
    assert row["train_flops"] == pytest.approx(3 * report.sparse_flops * 128, rel=1e-6)
    figures = validate.validate(["--checkpoint", str(tmp_path / "whole" / "last.pth.tar"), "--data-dir", str(digits)])
    assert figures["top1"] == row["eval_raw_top1"]


def test_sparse_pretraining_is_fine_tuned_dense_on_other_classes(run_train: Trainer, tmp_path: Path) -> None:
    assert run_train("--layers", "sparse:0.75", "--epochs", "1", "--experiment", "first", "--num-classes", "12") == 0
    first = tmp_path / "first" / "last.pth.tar"
    more = ["--initial-checkpoint", str(first), "--epochs", "1", "--experiment", "second"]
    assert run_train(*more) == 0
    weights = load(tmp_path / "second" / "last.pth.tar")
    assert weights["state_dict"]["classifier.weight"].shape[0] == 10
    assert not zeros(weights["state_dict"])  # all of them train
    one, two = (read_summary(tmp_path / name / "summary.csv")[-1] for name in ("first", "second"))
    assert two["train_flops_all_phases"] == one["train_flops"] + two["train_flops"]
    assert "train_flops_all_phases" not in one
    costs = count_costs(timm.create_model("test_efficientnet", num_classes=10), (3, 32, 32))
    assert two["train_flops"] == 3 * costs.flops * 64
    assert weights["flops_of_all_phases"] == two["train_flops_all_phases"]  # for a third one
    assert set(densify(first)) == set(weights["state_dict"])


def test_teacher(run_train: Trainer, trained: Path, tmp_path: Path) -> None:
    teacher = trained / "last.pth.tar"
    line = ["--model-kwargs", "act_layer=relu", "--teacher-checkpoint", str(teacher), "--epochs", "1"]
    assert run_train(*line, "--distill-task", "0", "--distill-layers", "blocks.*", "--model-ema") == 0
    state = load(tmp_path / "run" / "last.pth.tar")
    assert set(state["state_dict"]) == set(load(teacher)["state_dict"])


@pytest.mark.slow
def test_student_that_is_the_teacher_has_little_to_learn(run_train: Trainer, trained: Path, tmp_path: Path) -> None:
    teacher = trained / "last.pth.tar"
    line = ["--model-kwargs", "act_layer=relu", "--teacher-checkpoint", str(teacher), "--epochs", "1"]
    assert run_train(*line, "--distill-task", "0") == 0
    same = [*line, "--initial-checkpoint", str(teacher), "--distill-task", "0", "--lr", "0", "--experiment", "same"]
    assert run_train(*same, "--no-aug", "--drop", "0") == 0  # in train mode only batch statistics differ
    loss = {name: read_summary(tmp_path / name / "summary.csv")[-1]["train_loss"] for name in ("run", "same")}
    assert loss["same"] < loss["run"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--keep-zeros"], "--keep-zeros: no layer holds zeros"),
        (["--keep-zeros", "--layers", "sparse:0.5"], "--keep-zeros: layers of --layers"),
        (["--keep-zeros", "--sparsity-schedule", "rigl"], "--keep-zeros: the masks of zeros stay"),
        (["--teacher-checkpoint", "nowhere.pth.tar"], "--teacher-checkpoint: there is no file"),
        (["--teacher-checkpoint", "{trained}", "--teacher", "test_vit"], "is of test_efficientnet, not test_vit"),
        (["--teacher-checkpoint", "{trained}", "--distill-layers", "nothing"], "--distill-layers: layers 'nothing'"),
        (["--teacher-checkpoint", "{trained}", "--num-classes", "12"], "--num-classes: --teacher gives 10 outputs"),
        (["--teacher-checkpoint", "{trained}", "--aug-splits", "3"], "--teacher: a teacher sees each image once"),
    ],
)
def test_mistakes_write_nothing(
    run_train: Trainer, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert run_train(*(word.format(trained=trained / "last.pth.tar") for word in more)) == 2
    assert words in sentence(capsys)
    assert not list(tmp_path.iterdir())
