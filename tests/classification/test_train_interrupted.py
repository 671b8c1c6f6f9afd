"""Runs that are told to end, run out of space, or find their newest checkpoint damaged."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import train
from classification.run.checkpoints import by_age, newest_whole
from classification.run.report import read_summary
from revnets.training.errors import UserError

from .short_runs import Trainer
from .test_train_run import differing, load


def terminate_at(monkeypatch: pytest.MonkeyPatch, place: str, call: int) -> None:
    """SIGTERM in the so-manieth call of a function of the loop."""
    from classification.run import loop

    real, calls = getattr(loop, place), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, place, counted)


@pytest.mark.parametrize(
    ("place", "call", "where"),
    [("_step", 6, "batch 2 of 4 of epoch 1"), ("accuracy", 5, "batch 4 of 4 of epoch 0")],
    ids=["in an epoch", "in a validation"],
)
def test_sigterm_saves_and_ends_with_its_code(
    run_train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    place: str, call: int, where: str,
) -> None:  # fmt: skip
    line = ["--batch-size", "16", "--model-ema", "--reprob", "0.5", "--mixup", "0.2", "--sched-on-updates"]
    assert run_train(*line, "--experiment", "whole") == 0
    with monkeypatch.context() as patch:
        terminate_at(patch, place, call)
        assert run_train(*line, "--experiment", "parts") == 75
    assert f"SIGTERM at {where}: saved in recovery.pth.tar" in capsys.readouterr().err
    assert run_train(*line, "--experiment", "parts", "--resume", "auto") == 0
    assert not (tmp_path / "parts" / "recovery.pth.tar").exists()
    whole, parts = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "parts"))
    for key in whole.keys() - {"args"}:
        assert not differing(whole[key], parts[key]), key
    tables = [(tmp_path / name / "summary.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert [line.split(",")[:2] for line in tables[0]] == [line.split(",")[:2] for line in tables[1]]  # mean losses


def test_other_batches_than_in_the_middle_of_an_epoch(
    run_train: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        terminate_at(patch, "_step", 1)
        assert run_train() == 75
    assert run_train("--batch-size", "8", "--resume", "auto") == 2
    assert "epoch of 4 batches, now there are 8" in capsys.readouterr().err


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)  # more than the padding between two tensors
    path.unlink()  # its other names are other files
    path.write_bytes(content)


def test_the_last_good_checkpoint_is_used(
    trained: Path, run_train: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for path in by_age(tmp_path / "run"):
        if load(path)["epoch"] == 1:
            spoil(path)
    more = ["--model-ema", "--model-ema-decay", "0.5", "--model-kwargs", "act_layer=relu"]
    with caplog.at_level(logging.INFO):
        assert run_train(*more, "--resume", "auto") == 0
    assert "last.pth.tar' is damaged (the checksum of its part" in caplog.text
    assert "1 epochs done" in caplog.text
    for key in ("state_dict", "state_dict_ema", "optimizer", "history"):
        assert not differing(load(trained / "last.pth.tar")[key], load(tmp_path / "run" / "last.pth.tar")[key]), key


def test_all_checkpoints_damaged(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    for path in by_age(tmp_path / "run"):
        spoil(path)
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        newest_whole(tmp_path / "run")


def test_full_disk_leaves_the_checkpoint_before(
    run_train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train("--epochs", "1") == 0
    before = (tmp_path / "run" / "last.pth.tar").read_bytes()

    def full(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    assert run_train("--epochs", "2", "--resume", "auto") == 2
    message = capsys.readouterr().err
    assert "last.pth.tar' cannot be written (No space left on device): free space" in message
    assert "Traceback" not in message
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == before
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_what_a_kill_prevented_after_the_last_file_is_made_up_for(run_train: Trainer, tmp_path: Path) -> None:
    assert run_train("--epochs", "2", "--experiment", "whole", "--eval-metric", "loss") == 0
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", folder)
    for path in by_age(folder):  # as if killed when the last file was there, and nothing after it
        if path.name != "last.pth.tar" and load(path)["epoch"] == 1:
            path.unlink()
    (folder / ".tmp-half-last.pth.tar").write_bytes(b"half")
    assert run_train("--epochs", "2", "--resume", "auto", "--eval-metric", "loss") == 0
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert load(folder / "model_best.pth.tar")["epoch"] == load(tmp_path / "whole" / "model_best.pth.tar")["epoch"]


def test_patience_is_kept(run_train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule by the metric, which never gets better here: two such epochs lower the rate, however they went."""
    monkeypatch.setattr(train, "_validated", lambda *_: {"loss": 2.0, "top1": 10.0, "top5": 50.0})
    line = ["--sched", "plateau", "--patience-epochs", "1", "--epochs", "4"]
    assert run_train(*line, "--experiment", "whole") == 0
    with monkeypatch.context() as patch:
        terminate_at(patch, "_step", 4 + 4 + 2)
        assert run_train(*line, "--experiment", "parts") == 75
    stopped = load(tmp_path / "parts" / "recovery.pth.tar")["scheduler"]
    assert (stopped["num_bad_epochs"], stopped["cooldown_counter"]) == (1, 0)
    assert run_train(*line, "--experiment", "parts", "--resume", "auto") == 0
    whole, parts = (load(tmp_path / name / "last.pth.tar") for name in ("whole", "parts"))
    assert whole["scheduler"] == parts["scheduler"]
    rates = [[row["lr"] for row in read_summary(tmp_path / name / "summary.csv")] for name in ("whole", "parts")]
    assert rates[0] == rates[1]
    assert rates[0][3] < rates[0][0]


def test_updates_left_out_are_counted_on(run_train: Trainer, tmp_path: Path) -> None:
    line = ["--sched", "plateau", "--checkpoint-hist", "1"]
    assert run_train(*line, "--epochs", "1") == 0
    last = tmp_path / "run" / "last.pth.tar"
    saved = load(last)
    assert saved["guard"] == {"skipped": 0, "in_a_row": 0}
    torch.save({**saved, "guard": {"skipped": 2, "in_a_row": 1}}, last)
    assert run_train(*line, "--epochs", "2", "--resume", "auto") == 0
    assert load(last)["guard"] == {"skipped": 2, "in_a_row": 0}
    older = load(last)
    del older["guard"], older["scheduler"]["num_bad_epochs"], older["scheduler"]["cooldown_counter"]
    torch.save(older, last)
    assert run_train(*line, "--epochs", "3", "--resume", "auto") == 0
    assert load(last)["guard"] == {"skipped": 0, "in_a_row": 0}


def test_another_file_is_left_where_the_newest_names_are_one_file(
    run_train: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last, the best and the numbered checkpoint share their blocks on the disk; an older epoch's do not."""
    assert run_train("--epochs", "3", "--eval-metric", "loss") == 0
    folder = tmp_path / "run"
    newest = (folder / "last.pth.tar").stat().st_ino
    same = [path for path in by_age(folder) if path.stat().st_ino == newest]
    assert len(same) > 1
    content = bytearray(same[0].read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    with same[0].open("r+b") as file:  # in place, so under all its names
        file.write(content)
    found = newest_whole(folder)
    assert found is not None
    assert found.stat().st_ino != newest
    assert load(found)["epoch"] == 1
    assert all(f"{path.name}' is damaged" in caplog.text for path in same)
