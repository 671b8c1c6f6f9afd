"""The folder of a detector's run: one run at a time, and room for its files."""

import os
from pathlib import Path

import pytest

from detection import checkpoints
from detection import train as training
from revnets.training import lock
from revnets.training.lock import FolderLock


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_in_use_is_refused_unread(
    more: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "_PAUSE", 0.001)
    folder = tmp_path / "run"
    with FolderLock(folder):
        (folder / "epoch_1.pth").write_bytes(b"being written")
        (folder / checkpoints.LAST).write_text("epoch_1.pth")
        assert training.main([str(tiny), "--work-dir", str(folder), *more]) == 2
        said = capsys.readouterr().err
        assert f"error: '{folder}' is in use by process {os.getpid()} on {os.uname().nodename}" in said
        assert "give another --work-dir" in said
        assert (folder / "epoch_1.pth").read_bytes() == b"being written"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--resume", "--overwrite"], "--resume auto and --overwrite contradict each other"),
        (["--resume", "a.pth", "--cfg-options", "load_from=b.pth"], "load_from of --cfg-options, which has no effect"),
    ],
)
def test_options_that_exclude_each_other(
    more: list[str], words: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main([str(tiny), "--work-dir", str(tmp_path / "run"), *more]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["epoch_1.pth", "summary.json", "last_checkpoint", ".tmp-x", "best_x.pth"])
def test_files_of_a_run_need_room(name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    assert training.main([str(tiny), "--work-dir", str(tmp_path / "run"), "--overwrite"]) == 2
    assert f"{name}' is a folder, where a run has files of its own; move it away" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
