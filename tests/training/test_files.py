"""Whole files: under names that nobody can guess, through no link, as readable as any new file; the user's own stay."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from revnets.training import files
from revnets.training.files import (
    NotWritten,
    duplicate,
    leftovers,
    named_file,
    obstacle,
    put_in_place,
    remove_all,
    whole_file,
    whole_folder,
    write_csv,
    write_json,
)
from revnets.training.places import make_folder


def own(name: str) -> bool:
    return name in ("last.pth", "table.csv")


def write(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("new")


def again(path: Path) -> None:
    source = path.with_name("source")
    source.write_text("new")
    duplicate(source, path)
    source.unlink()


def copied(path: Path) -> None:
    """Where there are no hard links."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "link", fails(errno.EPERM))
        again(path)


def fails(number: int) -> Callable[..., Any]:
    def failing(*args: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    return failing


WRITERS = pytest.mark.parametrize("writer", [write, again, copied])


@WRITERS
def test_a_link_is_replaced_and_what_it_leads_to_stays(writer: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "last.pth"
    path.symlink_to(tmp_path / "victim")
    writer(path)
    assert not path.is_symlink()
    assert path.read_text() == "new"
    assert (tmp_path / "victim").read_text() == "precious"
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["last.pth"]


@WRITERS
def test_temporary_names_are_of_no_use_to_others(
    writer: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can guess one; and whoever did would not have his link followed."""
    (tmp_path / "victim").write_text("precious")
    path, seen = tmp_path / "last.pth", []
    real = files._temporary
    monkeypatch.setattr(files, "_temporary", lambda path: seen.append(real(path)) or seen[-1])
    for _ in range(2):
        writer(path)
        path.unlink()
    assert seen[0] != seen[1]
    assert all(name.name.startswith(".tmp-") and name.name.endswith("-last.pth") for name in seen)
    guessed = tmp_path / ".tmp-guessed-last.pth"
    guessed.symlink_to(tmp_path / "victim")
    monkeypatch.setattr(files, "_temporary", lambda path: guessed)
    if writer is again:
        monkeypatch.setattr(files.os, "link", fails(errno.EEXIST))
    with pytest.raises(NotWritten, match="File exists"):
        writer(path)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not path.exists()


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")

    def swapped() -> None:
        with whole_file(tmp_path / "table.csv") as path:
            path.unlink()
            path.symlink_to(tmp_path / "victim")

    with pytest.raises(NotWritten, match=r"table.csv' cannot be written"):
        swapped()
    assert [each.name for each in tmp_path.iterdir()] == ["victim"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000, 0o027])
@WRITERS
def test_who_may_read_it_is_as_of_any_new_file(writer: Callable[[Path], None], mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        writer(tmp_path / "last.pth")
        with whole_folder(tmp_path / "data") as folder:
            (folder / "x").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "last.pth").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_mask_of_the_process_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread would make its files for everyone meanwhile."""
    monkeypatch.setattr(os, "umask", fails(errno.EPERM))
    for writer in (write, again, copied):
        writer(tmp_path / "last.pth")


def test_threads_that_write_one_name(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write, args=(tmp_path / "last.pth",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("last.pth", "new")]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
@WRITERS
def test_a_name_that_cannot_be_given(
    writer: Callable[[Path], None], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "last.pth").write_text("old")
    monkeypatch.setattr(files.os, "replace", fails(number))
    with pytest.raises(NotWritten, match=rf"last.pth' cannot be written \({os.strerror(number)}\): \w+"):
        writer(tmp_path / "last.pth")
    assert (tmp_path / "last.pth").read_text() == "old"
    assert not list(tmp_path.glob(".tmp-*"))


@WRITERS
def test_a_folder_in_its_place(writer: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "last.pth").mkdir()
    (tmp_path / "last.pth" / "mine").touch()
    with pytest.raises(NotWritten, match=r"\(Is a directory\): move the folder of that name away"):
        writer(tmp_path / "last.pth")
    assert (tmp_path / "last.pth" / "mine").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_copies_keep_their_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    os.utime(tmp_path / "a", (5, 5))
    monkeypatch.setattr(files.os, "link", fails(errno.EPERM))
    duplicate(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").stat().st_mtime == 5
    assert (tmp_path / "a").stat().st_ino != (tmp_path / "b").stat().st_ino


def test_a_further_name_of_the_same_file_is_left(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    for _ in range(2):
        duplicate(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").stat().st_nlink == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_only_what_a_run_left_half_written_is_a_leftover(tmp_path: Path) -> None:
    mine = (".tmp-x", ".tmp-last.pth", ".tmp-notes-letter.txt", "tmp-last.pth", ".tmp--last.pth", "tmp", "last.pth")
    for name in mine:
        (tmp_path / name).touch()
    (tmp_path / ".tmp-abcd1234-last.pth").mkdir()
    (tmp_path / ".tmp-abcd5678-last.pth").symlink_to(tmp_path / "tmp")
    half = files._temporary(tmp_path / "last.pth")
    half.touch()
    assert leftovers(tmp_path, own) == [half]


def socket_of(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("table.csv", Path.mkdir, "table.csv' is a folder"),
        ("last.pth", lambda path: path.symlink_to("/nowhere/x"), "last.pth' is a link that leads nowhere"),
        ("last.pth", lambda path: path.symlink_to(path), "last.pth' is a link that leads nowhere"),
        (".tmp-x", Path.mkdir, ".tmp-x' is a folder"),
        ("table.csv", socket_of, "table.csv' is no regular file"),
        ("mine", Path.mkdir, ""),
        ("table.csv", Path.touch, ""),
        (".tmp-x", Path.touch, ""),
    ],
)
def test_what_stands_in_the_way(name: str, make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    assert obstacle(tmp_path, own).endswith(words)
    assert bool(obstacle(tmp_path, own)) == bool(words)


@pytest.mark.parametrize(
    "name",
    ["../outside.pth", "sub/../../outside.pth", "link.pth", "sub.pth", "", "..", 7, None, ["last.pth"], "a\0.pth"],
)
def test_names_out_of_files_lead_nowhere_else(name: object, tmp_path: Path) -> None:
    (tmp_path / "outside.pth").touch()
    folder = tmp_path / "run"
    (folder / "sub.pth").mkdir(parents=True)
    (folder / "link.pth").symlink_to(tmp_path / "outside.pth")
    assert named_file(folder, name) is None
    assert named_file(folder, str(tmp_path / "outside.pth")) is None


def test_a_folder_that_was_moved_has_its_files(tmp_path: Path) -> None:
    (tmp_path / "last.pth").touch()
    for name in ("last.pth", "/old/place/last.pth", "C:\\old\\last.pth", " last.pth\n"):
        assert named_file(tmp_path, name) == tmp_path / "last.pth"
    assert named_file(tmp_path, "last.pth", ".csv") is None


def test_a_look_whether_a_folder_can_be_used_changes_no_file(tmp_path: Path) -> None:
    (tmp_path / ".writable").write_text("precious")
    make_folder(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(".writable", "precious")]


def test_a_folder_that_is_not_empty_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with whole_folder(tmp_path / "data") as folder:
        (folder / "x").touch()
    with pytest.raises(NotWritten), whole_folder(tmp_path / "data") as folder:
        (folder / "y").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "x"]


@pytest.mark.parametrize("there", ["nothing", "file", "link"])
def test_files_are_put_in_place(there: str, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "precious").write_text("precious")
    for name in ("a", "b"):
        (tmp_path / "made" / name).write_text(f"new {name}")
    if there == "file":
        (tmp_path / "a").write_text("old")
    elif there == "link":
        (tmp_path / "a").symlink_to("precious")
    put_in_place(sorted((tmp_path / "made").iterdir()), tmp_path)
    assert [(tmp_path / name).read_text() for name in ("a", "b", "precious")] == ["new a", "new b", "precious"]
    assert not list((tmp_path / "made").iterdir())


def test_a_folder_in_place_of_a_file_keeps_all_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a", "b"):
        (tmp_path / "made" / name).write_text("new")
    with pytest.raises(NotWritten, match=r"b' cannot be written .*: move the folder of that name away"):
        put_in_place(sorted((tmp_path / "made").iterdir()), tmp_path)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["a", "b"]
    assert not list((tmp_path / "b").iterdir())
    assert not (tmp_path / "a").exists()


def test_all_files_are_removed_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text(path.name)
    plain = os.rename

    def fails(source: Path, target: Path) -> None:
        if Path(source).name == "c":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="Operation not permitted") as caught:
            remove_all(paths)
    assert caught.value.filename == str(paths[2])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "a", "b": "b", "c": "c"}
    remove_all([*paths, tmp_path / "missing"])
    assert not list(tmp_path.iterdir())


def test_tables_have_the_columns_of_all_rows_or_those_asked_for(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": 1}, {"b": "x,y", "a": 2}]
    assert write_csv(tmp_path / "table.csv", rows).read_text() == 'a,b\n1,\n2,"x,y"\n'
    assert write_csv(tmp_path / "empty.csv", [], ("a", "b")).read_text() == "a,b\n"


def test_json_is_json_whatever_the_numbers(tmp_path: Path) -> None:
    path = write_json(tmp_path / "found.json", {"loss": [float("nan"), 1.5], "inner": {"best": float("inf")}})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"loss": [None, 1.5], "inner": {"best": None}}
