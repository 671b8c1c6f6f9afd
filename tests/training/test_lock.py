"""A folder has one run: refused while another process has it, free at once when that one dies, however it does."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from revnets.training import lock as locks
from revnets.training.errors import UserError
from revnets.training.lock import NAME, FolderLock, InUse, held_here

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the processes of these tests are forks")


def holding(folder: Path, with_child: bool = False) -> tuple[int, int]:
    """A process that holds a folder, and its child, which is there to load data, or itself."""
    ready, tell = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            lock = FolderLock(folder)  # held until it is killed
            child = os.fork() if with_child else os.getpid()
            if child:
                os.write(tell, str(child).encode())
            time.sleep(600)
            lock.release()
        finally:
            os._exit(1)
    child = int(os.read(ready, 20))
    os.close(ready)
    os.close(tell)
    return process, child


def killed(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_the_other_process_and_its_host_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, pid = holding(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(locks, "_PAUSE", 0.001)
    try:
        with pytest.raises(InUse, match=rf"is in use by process {pid} on {os.uname().nodename} since 2.*give another"):
            FolderLock(tmp_path / "run")
        assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    finally:
        killed(process)


def test_a_kill_frees_the_folder_at_once(tmp_path: Path) -> None:
    process, _ = holding(tmp_path)
    killed(process)
    assert (tmp_path / NAME).exists()
    with FolderLock(tmp_path) as lock:
        assert held_here(tmp_path) is lock
        assert f"process {os.getpid()} on " in (tmp_path / NAME).read_text()
    assert not list(tmp_path.iterdir())


def test_a_loading_process_that_outlives_its_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    process, child = holding(tmp_path, with_child=True)
    killed(process)
    try:
        os.kill(child, 0)  # it lives
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_ends_in_a_fork_leaves_the_lock_to_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PAUSE", 0.001)
    with FolderLock(tmp_path) as lock:
        child = multiprocessing.get_context("fork").Process(target=lock.release)
        child.start()
        child.join()
        assert (tmp_path / NAME).exists()
        with pytest.raises(InUse):
            FolderLock(tmp_path)


def test_twice_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PAUSE", 0.001)

    def failing() -> None:
        with FolderLock(tmp_path):
            with pytest.raises(InUse, match=f"process {os.getpid()} on"):
                FolderLock(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    FolderLock(tmp_path).release()


def test_a_run_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    timer = threading.Timer(0.1, first.release)
    timer.start()
    with FolderLock(tmp_path) as second:
        assert held_here(tmp_path) is second
    timer.join()


def test_a_name_that_was_removed_between_open_and_lock_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the one who opened it before would hold a file without a name, and the next one a file of its own."""
    real, opened = locks._open, []

    def removed(path: Path) -> tuple[int, bool]:
        opened.append(real(path))
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(locks, "_open", removed)
    with FolderLock(tmp_path) as lock:
        assert len(opened) == 2
        assert held_here(tmp_path) is lock
        assert os.path.samestat(os.fstat(lock._handle), (tmp_path / NAME).stat())


def test_folders_that_were_made_go_while_they_are_empty(tmp_path: Path) -> None:
    FolderLock(tmp_path / "a" / "b").release()
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "mine").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["mine"]


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def hard_link(path: Path, victim: Path) -> None:
    victim.write_text("")
    path.hardlink_to(victim)


def other_file(path: Path, victim: Path) -> None:
    path.write_text("precious")


def folder(path: Path, victim: Path) -> None:
    path.mkdir()


def fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("plant", [link, hard_link, other_file, folder, fifo])
def test_what_has_the_name_of_the_lock_is_neither_used_nor_changed(plant: Any, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / NAME, victim)
    before = (victim.read_text(), (tmp_path / "run" / NAME).lstat())
    with pytest.raises(UserError, match="is something else than the lock of a run; move it away"):
        FolderLock(tmp_path / "run")
    assert before == (victim.read_text(), (tmp_path / "run" / NAME).lstat())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), FolderLock(tmp_path) as lock:
        assert not lock.known
    assert caplog.text.count("is on a file system without locks") == 1


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"run' cannot be used for a run \(Not a directory\); give"):
        FolderLock(tmp_path / "file" / "run")

    def refused(path: Any, *more: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(locks.os, "open", refused)
        with pytest.raises(UserError, match=r"cannot be used for a run \(Permission denied\)"):
            FolderLock(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_file_of_another_user_who_crashed_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be read and removed, but not written to."""
    (tmp_path / NAME).write_text("process 1 on elsewhere since 2020-01-01 00:00:00\n")
    real = os.open

    def theirs(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_RDWR and Path(path).exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *more)

    monkeypatch.setattr(locks.os, "open", theirs)
    with FolderLock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / NAME).read_text()


@pytest.mark.slow
def test_many_at_once_are_one_after_the_other(tmp_path: Path) -> None:
    """Processes that take and give back a folder, which goes each time, never hold it together."""

    def come_and_go() -> None:
        for _ in range(100):
            try:
                with FolderLock(tmp_path / "run"):
                    mark = tmp_path / "mark"
                    mark.touch(exist_ok=False)
                    mark.unlink()
            except InUse:
                pass

    running = [multiprocessing.get_context("fork").Process(target=come_and_go) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join(300)
    assert [process.exitcode for process in running] == [0] * 4
    assert not list(tmp_path.iterdir())
