"""Files that are written whole or not at all, under temporary names that nobody can guess; and why one could not be."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
_LEFTOVER = re.compile(re.escape(TEMPORARY) + r"\w+-(?P<name>.+)", re.DOTALL)
_EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_REMEDIES = {
    errno.EISDIR: "move the folder of that name away",
    errno.ENOTDIR: "give another folder",
    errno.ENOENT: "its folder is gone, make it anew",
    errno.EACCES: "make its folder writable, or give another one",
    errno.EPERM: "make its folder writable, or give another one",
    errno.EROFS: "give a folder that is not read-only",
}


class NotWritten(OSError):
    """A file could not be written, for want of space mostly; what was there before is whole."""

    def __init__(self, path: str | Path, error: BaseException) -> None:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno):
            cause = cause.__cause__ or cause.__context__  # torch's writer hides it behind an error of its own
        reason = cause.strerror if isinstance(cause, OSError) else " ".join(str(error).split())[:120]
        number = cause.errno if isinstance(cause, OSError) else None
        remedy = _REMEDIES.get(number or 0, "free space there, or give another folder")
        super().__init__(f"'{path}' cannot be written ({reason}): {remedy}; what was saved before is whole")


@contextmanager
def writing(path: str | Path, kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Says which file it was that could not be written, and why.

    Args:
        path: Of the file, for the message.
        kinds: Errors by which writing fails; of ``torch.save`` RuntimeError, too.

    Raises:
        NotWritten: The block failed as writing fails.
    """
    try:
        yield
    except NotWritten:
        raise
    except kinds as error:
        raise NotWritten(path, error) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; it takes the name `path` only when the block ends without an exception.

    The temporary name cannot be guessed and is taken by nobody else, a link included. It keeps the ending of `path`,
    since some writers choose the format by it. Who may read the file is as of any new one: the kernel applies umask
    and access lists. Where `path` is a link, the file takes the place of the link; what it led to stays as it is.

    Args:
        path: The file to write; its folder must exist.

    Yields:
        The path to write to.

    Raises:
        NotWritten: There is no space, say.
    """
    with writing(path):
        temporary = _temporary(path)
        os.close(os.open(temporary, _EXCLUSIVE, 0o666))
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


def write(path: Path, save: Callable[[Path], Any]) -> Path:
    """Lets `save` write a file that appears at `path` complete or not at all.

    Args:
        path: The file to write; its folder must exist.
        save: Is given the path to write to.

    Raises:
        NotWritten: There is no space, say.
    """
    with whole_file(path) as temporary:
        save(temporary)
    return path


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> Path:
    """Writes a CSV file, whole or not at all; what a row lacks stays empty.

    Args:
        path: The file; its folder must exist.
        rows: A line each.
        columns: By default the keys of all rows, in the order in which they come up.

    Raises:
        NotWritten: There is no space, say.
    """
    found = list(rows)

    def save(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns or list(dict.fromkeys(name for row in found for name in row)))
            writer.writeheader()
            writer.writerows(found)

    return write(path, save)


def write_json(path: Path, content: Any) -> Path:
    """Writes a JSON file, whole or not at all; numbers that are not finite, of which JSON knows none, become null.

    Args:
        path: The file; its folder must exist.
        content: Plain values.

    Raises:
        NotWritten: There is no space, say.
    """
    text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
    return write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duplicate(source: Path, path: Path) -> None:
    """Gives a file that is never changed in place a further name, or copies it where the file system has one name each.

    Args:
        source: The file; of a link, what it leads to.
        path: Its further name, which another file may have now.

    Raises:
        NotWritten: There is no space, say.
    """
    with writing(path):
        source = source.resolve(strict=True)
        if os.path.lexists(path) and os.path.samestat(source.stat(), path.lstat()):
            return
        temporary = _temporary(path)
        try:
            try:
                os.link(source, temporary)
            except OSError:
                _copy(source, temporary)
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, which takes the name `path` when the block ends without an exception.

    Args:
        path: The folder to make; an empty one may be there.

    Yields:
        The folder to fill.

    Raises:
        NotWritten: There is no space, say.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.mkdir()
        try:
            yield temporary
            if path.is_dir() and not path.is_symlink():
                path.rmdir()  # only an empty one goes
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(files: Sequence[Path], folder: Path) -> None:
    """Moves whole files into a folder of the same file system, where each replaces a file of its name.

    Args:
        files: In this order.
        folder: That is there.

    Raises:
        NotWritten: Something has a name of theirs that is no file, or they cannot be moved; then none of them is.
    """
    for target in (folder / file.name for file in files):
        with writing(target):
            if target.is_dir() and not target.is_symlink():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    for file in files:
        with writing(folder / file.name):
            _sync(file)
            os.replace(file, folder / file.name)


def remove_all(paths: Sequence[Path]) -> None:
    """Removes files, or none of them where one cannot be removed: they lose their names first, which can be undone.

    Args:
        paths: Some need not be there.

    Raises:
        OSError: One cannot be removed; ``filename`` says which.
    """
    moved: dict[Path, Path] = {}
    try:
        for path in paths:
            temporary = _temporary(path)
            with suppress(FileNotFoundError):
                os.rename(path, temporary)
                moved[path] = temporary
    except OSError as error:
        for before, temporary in moved.items():
            os.rename(temporary, before)
        raise OSError(error.errno, error.strerror, str(path)) from error
    for temporary in moved.values():
        temporary.unlink()


def leftovers(folder: Path, own: Callable[[str], object]) -> list[Path]:
    """Temporary files that a killed process has left in a folder where no other process writes now.

    Only such names count as ``whole_file`` makes for the files of a run: whoever else has a file called ``.tmp-x`` or
    so keeps it; a folder or a link is never one.

    Args:
        folder: Held by this process, see ``lock.py``.
        own: Whether the run writes a file of that name.
    """
    names = ((path, _LEFTOVER.fullmatch(path.name)) for path in folder.glob(f"{TEMPORARY}*"))
    return [path for path, match in names if match and own(match["name"]) and stat.S_ISREG(path.lstat().st_mode)]


def obstacle(folder: Path, own: Callable[[str], object]) -> str:
    """What stands in a folder where the files of a run go, in words; nothing where there is room.

    A link to a file may have such a name: it is read through, and replaced by the next file that is written.

    Args:
        folder: Of the run.
        own: Whether the run writes a file of that name.
    """
    for path in sorted(folder.iterdir()):
        if not (own(path.name) or path.name.startswith(TEMPORARY)):
            continue
        try:
            kind = path.stat().st_mode
        except OSError:
            return f"'{path}' is a link that leads nowhere"
        if stat.S_ISDIR(kind):
            return f"'{path}' is a folder"
        if not stat.S_ISREG(kind):
            return f"'{path}' is no regular file"
    return ""


def named_file(folder: Path, name: object, ending: str = ".pth") -> Path | None:
    """The file of a folder that a name out of another file means; such a name is never a path to elsewhere.

    Args:
        folder: Of a run.
        name: Anything; of a path its last part counts, since the folder may have been moved.
        ending: Of the file.

    Returns:
        The file, where there is one in the folder itself, no link.

    Example:
        >>> named_file(Path("run"), "/etc/passwd") is None
        True
    """
    base = re.split(r"[/\\]", name.strip())[-1] if isinstance(name, str) else ""
    if not base.endswith(ending) or not base.isprintable() or len(base) > 200:
        return None
    try:
        return folder / base if stat.S_ISREG((folder / base).lstat().st_mode) else None
    except OSError:
        return None


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{path.name[-128:]}")  # names have 255 bytes at most


def _sync(path: Path) -> None:
    """Else a machine that loses power may keep the name and not the content."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file, os.fdopen(os.open(target, _EXCLUSIVE, 0o666), "wb") as copy:
        shutil.copyfileobj(file, copy)
        copy.flush()
        os.fsync(copy.fileno())
    times = source.stat()
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))  # checkpoints go by age
