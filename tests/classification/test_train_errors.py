"""User mistakes: exit code 2, one sentence that names the value and the fix, nothing half-written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from classification import train, validate
from classification.run.report import read_summary
from revnets.kernels import build
from revnets.training.files import whole_file

from .short_runs import ROOT, SHORT, TINY, Trainer


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data-dir", "/nowhere"], ["--data-dir", "/nowhere"]),
        (["--train-split", "train.tar"], ["--train-split", "train.tar"]),
        (["--model", "revbifpn_s99"], ["--model", "revbifpn_s99"]),
        (["--model-kwargs", "mode=backwards"], ["--model", "mode", "backwards", "--model-kwargs"]),
        (["--batch-size", "1000"], ["--batch-size", "64", "1000"]),
        (["--num-classes", "5"], ["--num-classes", "10", "5"]),
        (["--opt", "adamww"], ["--opt", "adamww", "'adamw'"]),
        (["--opt-kwargs", "nonsense=1"], ["--opt", "nonsense"]),
        (["--sched", "slope"], ["--sched", "slope"]),
        (["--aa", "nonsense"], ["--aa", "nonsense"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--mean", "0.5", "0.5"], ["--mean", "3"]),
        (["--sync-bn"], ["--sync-bn", "--dist-bn"]),
        (["--resume", "nowhere.pth.tar"], ["--resume", "nowhere.pth.tar"]),
        (["--initial-checkpoint", "nowhere.pth.tar"], ["--initial-checkpoint", "nowhere.pth.tar"]),
        (["--pretrained-path", "nowhere.pth.tar"], ["--pretrained-path", "nowhere.pth.tar"]),
        (["--model", "test_vit", "--img-size", "50"], ["test_vit", "50"]),
        (["--sparse-kernel"], ["--sparse-kernel", "test_efficientnet", "--layers"]),
        (["--sparse-kernel", "--layers", "sparse:0.9", "--amp"], ["--sparse-kernel", "--amp"]),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else None,
)
def test_mistakes_write_nothing(
    run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: list[str]
) -> None:
    assert run_train(*more) == 2
    message = sentence(capsys)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


def test_a_sparse_kernel_without_compiler(
    run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.COMPILER_VARIABLE, "none")
    build.load_kernel.cache_clear()
    try:
        assert run_train("--sparse-kernel", "--layers", "sparse:0.9") == 2
    finally:
        build.load_kernel.cache_clear()
    message = sentence(capsys)
    assert all(word in message for word in ("--sparse-kernel", "REVNETS_CXX=none", "leave it out")), message
    assert not list(tmp_path.iterdir())


def test_class_folders_that_differ(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(digits, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "validation" / "3")
    assert train.main([*SHORT, "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 2
    assert "'3'" in sentence(capsys)


def test_loss_that_is_not_finite_stops_the_run(
    run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train("--lr", "1e30", "--opt", "sgd", "--sched", "none", "--nonfinite-limit", "3") == 2
    message = sentence(capsys)
    assert "3 updates in a row were left out" in message
    assert re.search(r"the first output that is not finite is that of layer '\S+' \(\w+\)", message), message
    assert "learning rate" in message
    assert not list((tmp_path / "run").glob("*.pth.tar"))


@pytest.mark.parametrize("script", [train.main, validate.main], ids=["train", "validate"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "list"])
def test_damaged_checkpoint(
    script: object, damage: str, trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.pth.tar"
    whole = (trained / "last.pth.tar").read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "list": b""}[damage])
    if damage == "list":
        torch.save([1, 2], path)
    if script is train.main:
        code = train.main([*SHORT, "--data-dir", str(digits), "--output", str(tmp_path / "o"), "--resume", str(path)])
    else:
        code = validate.main([*TINY, "--data-dir", str(digits), "--checkpoint", str(path)])
    assert code == 2
    assert "bad.pth.tar" in sentence(capsys)
    assert not (tmp_path / "o").exists()


def test_checkpoint_that_needs_pickled_code_is_refused(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "path": Path("x")}, tmp_path / "bad.pth.tar")
    assert validate.main([*TINY, "--data-dir", str(digits), "--checkpoint", str(tmp_path / "bad.pth.tar")]) == 2
    assert "reading it would run 'pathlib" in sentence(capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model", "test_resnet"], ["test_efficientnet", "test_resnet"]),
        (["--num-classes", "12"], ["classifier", "(10", "(12"]),
        (["--opt", "sgd"], ["optimizer", "--opt"]),
    ],
)
def test_checkpoint_of_something_else(
    run_train: Trainer, trained: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: list[str]
) -> None:
    line = ["--model-kwargs", "act_layer=relu", "--resume", str(trained / "last.pth.tar"), "--experiment", "new"]
    line = [] if "test_resnet" in more else line[:2]
    assert run_train(*line, "--resume", str(trained / "last.pth.tar"), "--experiment", "new", *more) == 2
    message = sentence(capsys)
    assert all(word in message for word in words), message


SET_ANEW = {
    "--weight-decay": (["0.25"], "weight_decay 2e-05", "0.25"),
    "--opt-betas": (["0.8", "0.9"], "betas [0.9, 0.999]", "[0.8, 0.9]"),
    "--opt-eps": (["0.125"], "eps 1e-08", "0.125"),
}


@pytest.mark.parametrize("flag", SET_ANEW)
def test_other_settings_of_the_optimizer_than_the_checkpoints(
    run_train: Trainer, trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str
) -> None:
    """They would be replaced by the checkpoint's: refused where they are given, kept where they are not."""
    values, theirs, own = SET_ANEW[flag]
    line = ["--model-kwargs", "act_layer=relu", "--resume", str(trained / "last.pth.tar"), "--experiment", "new"]
    assert run_train(*line, flag, *values) == 2
    message = sentence(capsys)
    assert f"was trained with {theirs}, and {flag} would make it {own}; give what" in message
    assert not (tmp_path / "new").exists()


def test_settings_of_the_optimizer_that_are_not_given_stay(
    run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    line = ["--opt", "sgd", "--epochs", "1", "--checkpoint-hist", "1"]
    assert run_train(*line, "--momentum", "0.75", "--weight-decay", "0.001") == 0
    again = [*line, "--epochs", "2", "--resume", "auto"]
    capsys.readouterr()
    assert run_train(*again, "--momentum", "0.9") == 2  # its default, and given
    assert "was trained with momentum 0.75, and --momentum would make it 0.9" in sentence(capsys)
    assert run_train(*again) == 0
    assert "momentum stays 0.75" in caplog.text
    groups = torch.load(tmp_path / "run" / "last.pth.tar")["optimizer"]["param_groups"]
    assert {group["momentum"] for group in groups} == {0.75}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.001}


def test_rates_that_no_schedule_would_bring_back(
    run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for schedule in ("none", "plateau"):
        line = ["--sched", schedule, "--experiment", schedule]
        assert run_train(*line, "--epochs", "1") == 0
        capsys.readouterr()
        assert run_train(*line, "--resume", "auto", "--lr", "0.5") == 2
        assert "lr 0.003, and --lr would make it 0.5" in sentence(capsys)
    assert run_train("--epochs", "1", "--experiment", "cosine") == 0
    assert (
        run_train("--experiment", "cosine", "--resume", "auto", "--lr", "0.001") == 0
    )  # by the epoch: it takes effect


@pytest.mark.parametrize("odd", ["lost", "one too many"])
def test_the_state_of_an_optimizer_is_whole(
    run_train: Trainer, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: str
) -> None:
    checkpoint = torch.load(trained / "last.pth.tar")
    state = checkpoint["optimizer"]
    assert state["without_state"] == []
    if odd == "lost":
        del state["state"][3]
    else:
        state["without_state"] = [3]
    torch.save(checkpoint, tmp_path / "odd.pth.tar")
    line = ["--model-kwargs", "act_layer=relu", "--resume", str(tmp_path / "odd.pth.tar"), "--experiment", "new"]
    assert run_train(*line) == 2
    assert "optimizer.state[3] is " in sentence(capsys)
    assert not (tmp_path / "new").exists()


def test_weights_only_file_cannot_be_resumed(
    run_train: Trainer, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = torch.load(trained / "last.pth.tar", weights_only=True)["state_dict"]
    torch.save(weights, tmp_path / "weights.pth")
    assert run_train("--resume", str(tmp_path / "weights.pth")) == 2
    assert "--initial-checkpoint" in sentence(capsys)


@pytest.mark.parametrize(
    "command",
    [
        ["classification/train.py", "--data-dir", "/nowhere"],
        ["-m", "classification.train", "--data-dir", "/nowhere"],
        ["classification/validate.py", "--data-dir", "/nowhere", "--model", "test_resnet"],
    ],
    ids=["train-by-path", "train-as-module", "validate-by-path"],
)
def test_scripts_end_with_code_2_and_one_sentence(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "'/nowhere'" in done.stderr
    assert done.stderr.startswith("error: ")


def test_whole_file_leaves_the_old_one_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_one_bad_batch_is_skipped_and_counted(
    run_train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from classification.run import loop

    def spoil(run: object, images: torch.Tensor, step: int) -> None:
        if step == 1:
            images[0] = float("nan")

    monkeypatch.setattr(loop, "_look_at_drift", spoil)
    assert run_train("--model-ema", "--epochs", "1") == 0
    assert read_summary(tmp_path / "run" / "summary.csv")[0]["train_skipped"] == 1
    content = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    for key in ("state_dict", "state_dict_ema"):
        assert all(value.isfinite().all() for value in content[key].values())


def test_drift_is_in_the_summary(run_train: Trainer, tmp_path: Path) -> None:
    line = ["--model", "test_revbifpn", "--model-kwargs", "exact=false", "--drift-interval", "2", "--epochs", "1"]
    assert run_train(*line) == 0
    assert 0 < read_summary(tmp_path / "run" / "summary.csv")[0]["train_drift"] < 1e-2


def test_values_off_the_exact_grid_end_with_its_advice(run_train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--model", "test_revbifpn", "--opt", "sgd", "--lr", "1e6", "--sched", "none", "--nonfinite-limit", "2"]
    assert run_train(*line) == 2
    message = sentence(capsys)
    assert "2 updates in a row" in message
    assert "beyond the range" in message or "not finite" in message
