"""The folder of a run: one run at a time, room for its files, and nothing of anybody else's is changed."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from classification.options import TrainOptions
from classification.run.checkpoints import Saver
from classification.run.folder import RunFolder, writes
from classification.run.state import State
from revnets.training import lock
from revnets.training.errors import UserError
from revnets.training.lock import FolderLock

from ..short_runs import Trainer
from ..test_train_errors import sentence
from ..test_train_run import load


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PAUSE", 0.001)


def contents(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else os.readlink(path) if path.is_symlink()
        else None
        for path in folder.rglob("*")
    }  # fmt: skip


def choose(output: Path, **options: object) -> RunFolder:
    return RunFolder(TrainOptions(model="test_vit", output=str(output), **options), 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume", "auto"], ["--resume", "{}/run/last.pth.tar"]])
def test_a_folder_in_use_is_refused_unread(
    more: list[str], run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FolderLock(tmp_path / "run"):
        (tmp_path / "run" / "last.pth.tar").write_bytes(b"being written")
        before = contents(tmp_path)
        assert run_train(*(word.format(tmp_path) for word in more)) == 2
        assert f"run' is in use by process {os.getpid()} on {os.uname().nodename}" in sentence(capsys)
        assert contents(tmp_path) == before


def test_the_folder_is_given_back(run_train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error, as in a notebook, where the process lives on."""
    from classification import train

    with monkeypatch.context() as patch:
        patch.setattr(train, "_epochs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_train("--epochs", "1")
    assert run_train("--epochs", "1") == 0
    assert run_train("--epochs", "2", "--resume", "auto") == 0
    assert not (tmp_path / "run" / lock.NAME).exists()


def test_a_run_without_a_name_takes_the_next_number(tmp_path: Path) -> None:
    first, second = choose(tmp_path), choose(tmp_path)
    (second.path / "summary.csv").touch()
    third = choose(tmp_path)
    assert [each.path.name for each in (first, second, third)] == ["test_vit-32", "test_vit-32-1", "test_vit-32-2"]
    for each in (first, second, third):
        each.close()
    assert [path.name for path in tmp_path.iterdir()] == ["test_vit-32-1"], "the others are empty"
    with pytest.raises(UserError, match="is in use by"), FolderLock(tmp_path / "test_vit-32"):
        choose(tmp_path, overwrite=True)


def test_auto_goes_on_with_the_newest_and_waits_for_none(tmp_path: Path) -> None:
    for age, name in enumerate(("test_vit-32", "test_vit-32-1")):
        (tmp_path / name).mkdir()
        torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / name / "last.pth.tar")
        os.utime(tmp_path / name / "last.pth.tar", (age, age))
    found = choose(tmp_path, resume="auto")
    assert found.checkpoint == tmp_path / "test_vit-32-1" / "last.pth.tar"
    with pytest.raises(UserError, match="32-1' is in use by"):
        choose(tmp_path, resume="auto")
    found.close()


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["summary.csv", "args.yaml", "last.pth.tar", "checkpoint-7.pth.tar", "curves.png"])
@pytest.mark.parametrize(
    "make",
    [Path.mkdir, lambda path: path.symlink_to("/nowhere/x"), lambda path: path.symlink_to(path.name), fifo],
    ids=["folder", "dangling", "loop", "fifo"],
)
@pytest.mark.parametrize("more", [{}, {"resume": "auto"}, {"overwrite": True}], ids=str)
def test_files_of_a_run_need_room(
    make: Callable[[Path], None], name: str, more: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"{name}' is a? ?(folder|link|no regular)|already holds a run"):
        choose(tmp_path, experiment="run", **more)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


BROKEN = {
    "other columns": b"a,b\n1,2\n",
    "no epoch": b"epoch,train_loss\n,2\n",
    "half an epoch": b"epoch,train_loss\n0.5,2\n",
    "negative": b"epoch,train_loss\n-1,2\n",
    "endless": b"epoch,train_loss\n1e300,2\n",
    "not a number": b"epoch,train_loss\nnan,2\n",
    "words": b"epoch,train_loss\n0,high\n",
    "more cells": b"epoch,train_loss\n0,1,2,3\n",
    "binary": bytes(range(256)),
    "nulls": bytes(64),
    "long": b"epoch,x\n0," + b"9" * 200_000 + b"\n",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_summary_that_is_none(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "run" / "last.pth.tar")
    (tmp_path / "run" / "summary.csv").write_bytes(text)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"summary.csv' is no summary of a run \(.*\); delete it or choose another"):
        choose(tmp_path, experiment="run", resume="auto")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "step,layer\nx,y\n", "step,layer\n1\n"])
def test_numerics_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "run" / "last.pth.tar")
    (tmp_path / "run" / "numerics.csv").write_text(text)
    with pytest.raises(UserError, match="is no table of numerics"):
        choose(tmp_path, experiment="run", resume="auto", numerics_interval=1)


def test_files_of_the_user_stay(run_train: Trainer, tmp_path: Path) -> None:
    """What only looks like something of a run's, through a start, another one, and --overwrite."""
    folder = tmp_path / "run"
    folder.mkdir()
    mine = [".tmp-x", ".tmp-last.pth.tar", "tmp.pth.tar", "tmp", ".tmp-my-notes.txt", "checkpoint-best.pth.tar.txt"]
    assert run_train("--epochs", "1") == 0
    for name in [*mine, "mine.pth.tar"]:
        (folder / name).write_text("precious")
    assert run_train("--epochs", "2", "--resume", "auto") == 0, "mine.pth.tar is the newest, and no checkpoint"
    assert run_train("--epochs", "1", "--overwrite") == 0
    assert {name: (folder / name).read_text() for name in [*mine, "mine.pth.tar"]} == dict.fromkeys(
        [*mine, "mine.pth.tar"], "precious"
    )


def test_overwriting_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    for name in ("summary.csv", "curves.png"):
        (tmp_path / "run" / name).touch()
    folder = choose(tmp_path, experiment="run", overwrite=True)
    plain = os.rename

    def refused(path: Path, target: Path) -> None:
        if Path(path).name == "summary.csv":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        with pytest.raises(
            UserError, match=r"--overwrite: '.*summary.csv' cannot be deleted \(Operation not permitted"
        ):
            folder.clear()
    assert {"summary.csv", "curves.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    folder.close()


def test_half_written_files_stay_where_nobody_can_say_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    half = tmp_path / "run" / ".tmp-0123456789abcdef-last.pth.tar"
    for known in (False, True):
        half.parent.mkdir(exist_ok=True)
        half.touch()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            if not known:
                patch.setattr(fcntl, "flock", none)
            folder = choose(tmp_path, experiment="run")
            folder.clear()
            folder.close()
        assert half.exists() == (not known)


def saver(folder: Path) -> Saver:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = State(model=model, optimizer=optimizer)
    return Saver(state, {"model": "x"}, folder, decreasing=False, max_history=1)


ODD = {
    "above": "../precious", "absolute": "{}/precious", "own name above": "../checkpoint-1.pth.tar",
    "absolute own name": "{}/checkpoint-1.pth.tar", "another file of the run": "last.pth.tar",
    "a link": "checkpoint-2.pth.tar",
    "a folder": "checkpoint-3.pth.tar", "not a text": 7, "nothing": None, "a list": ["checkpoint-1.pth.tar"],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("here", [True, False], ids=["of this run", "of elsewhere"])
def test_a_checkpoint_cannot_name_files_that_are_deleted(name: object, here: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for each in ("precious", "checkpoint-1.pth.tar", "run/last.pth.tar"):
        (tmp_path / each).write_text("precious")
    (folder / "checkpoint-2.pth.tar").symlink_to(tmp_path / "precious")
    (folder / "checkpoint-3.pth.tar").mkdir()
    files = [[name.format(tmp_path) if isinstance(name, str) else name, -1e9]]
    path = folder / "last.pth.tar" if here else tmp_path / "precious"
    own = saver(folder)
    own.restore_history({"epoch": 0, "history": {"files": files, "best_epoch": 0, "best_metric": 1.0}}, path, False)
    before = contents(tmp_path)
    for epoch in (5, 6, 7):
        own.save_checkpoint(epoch, float(epoch))
    after = contents(tmp_path)
    assert {each: after.get(each) for each in before if each != "run/last.pth.tar"} == {
        each: value for each, value in before.items() if each != "run/last.pth.tar"
    }
    assert (folder / "checkpoint-7.pth.tar").exists()
    assert not (folder / "checkpoint-6.pth.tar").exists()


@pytest.mark.parametrize(
    "history", [None, 3, [], {"files": 3}, {"files": [3]}, {"files": [[1, 2, 3]]}, {"files": {"a": 1}}]
)
def test_a_history_that_is_none(history: object, tmp_path: Path) -> None:
    own = saver(tmp_path)
    own.restore_history({"epoch": 0, "history": history}, tmp_path / "last.pth.tar", False)
    assert own.checkpoint_files == []


def test_a_name_given_twice_keeps_its_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1.pth.tar").write_text("x")
    own = saver(tmp_path)
    files = [["checkpoint-1.pth.tar", 9.0], ["checkpoint-1.pth.tar", -9.0]]
    own.restore_history({"epoch": 1, "history": {"files": files}}, tmp_path / "last.pth.tar", False)
    assert len(own.checkpoint_files) == 1


def test_history_of_another_folder_is_of_other_files(run_train: Trainer, trained: Path, tmp_path: Path) -> None:
    """Its names are not those of the run that goes on in this folder."""
    shutil.copytree(trained, tmp_path / "run")
    own = saver(tmp_path / "run")
    checkpoint = load(trained / "last.pth.tar")
    own.restore_history(checkpoint, trained / "last.pth.tar", False)
    named = {os.path.basename(file) for file, _ in own.checkpoint_files}
    assert named <= {"checkpoint-1.pth.tar"}, "the epoch of the checkpoint itself, at most"
    assert writes("checkpoint-12.pth.tar")
    assert not writes("checkpoint-x.pth.tar")
