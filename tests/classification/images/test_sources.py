"""Command lines whose data are not what they seem: an error or a warning before anything is trained."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from classification import validate
from classification.images.data import open_dataset
from classification.images.sources import check_apart
from classification.options import TrainOptions
from revnets.training.errors import UserError

from ..short_runs import TINY, Trainer

LINES = {
    "training split": ["--train-split", "trainn"],
    "validation split": ["--val-split", "vall"],
    "no name": ["--val-split", ""],
    "a part of one": ["--train-split", "train[:50%]"],
    "one within the other": ["--train-split", "."],
    "the same by another name": ["--val-split", "train/../train"],
    "an unknown kind of data": ["--dataset", "cifar10"],
    "a split that torchvision's has not": ["--dataset", "torch/mnist", "--train-split", "trainn"],
    "the same half": ["--dataset", "torch/mnist", "--train-split", "test"],
    "class map": ["--class-map", "nowhere.txt"],
}


@pytest.mark.parametrize("what", LINES)
def test_no_run_on_other_images(
    what: str, run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(*LINES[what]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert error[0].startswith(("error: --train-split", "error: --val-split", f"error: {LINES[what][0]}")), error
    assert not list(tmp_path.iterdir())


def test_validation_too(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main([*TINY, "--data-dir", str(digits), "--val-split", "vall"]) == 2
    assert "there is no 'vall'" in capsys.readouterr().err


def test_the_same_split_for_both_is_warned_of(digits: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_apart(TrainOptions(data_dir=str(digits), val_split="train"))
    assert "accuracy will be that on training images" in caplog.text
    caplog.clear()
    check_apart(TrainOptions(data_dir=str(digits)))
    assert not caplog.text


def test_one_archive_is_no_pair_of_splits(digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(digits / "train", arcname=".")
    options = TrainOptions(data_dir=str(path))
    assert len(open_dataset(options, "validation", training=False)) == 64  # for validate.py
    with pytest.raises(UserError, match="are the same"):
        check_apart(options)


def test_what_timm_kept_of_another_archive_is_not_used(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(digits / "train", arcname=".")
    (tmp_path / "_train_tarinfos.pickle").write_bytes(b"rubbish")
    monkeypatch.setattr("os.path.getsize", lambda path: 1 << 40)  # timm asks it whether to keep a pickle
    assert len(open_dataset(TrainOptions(data_dir=str(tmp_path)), "train.tar", training=True)) == 64
    assert (tmp_path / "_train_tarinfos.pickle").read_bytes() == b"rubbish"


def test_classes_that_a_class_map_leaves_out_are_named(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "names.txt").write_text("3\n1\n77\n")
    options = TrainOptions(data_dir=str(digits), class_map=str(tmp_path / "names.txt"))
    dataset = open_dataset(options, "train", training=True)
    assert 0 < len(dataset) < 64
    assert "images of 8 classes of --train-split are left out (0, 2, 4, 5, 6)" in caplog.text
    assert "1 of its classes have no images in --train-split (77)" in caplog.text


def test_a_class_folder_that_is_empty_in_both(
    digits: Path, tmp_path: Path, run_train: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits, tmp_path / "data")
    for split in ("train", "validation"):
        (tmp_path / "data" / split / "ten").mkdir()
    assert run_train("--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")) == 2
    assert "class folder 'ten'" in capsys.readouterr().err
