"""Paths that somebody gave: whether they can be read, or written to, known before minutes of work, leaving no trace."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_TEMPORARY = ".tmp-12345678-"  # as long as what ``whole_file`` puts before a name


def check_exists(path: Path, what: str, name: str = "") -> Path:
    """The path, if something is there.

    Args:
        path: given.
        what: that is looked for, in words.
        name: of the option, for the message.

    Raises:
        ValueError: for what is not there or cannot be looked at.

    Example:
        >>> check_exists(Path("/nowhere"), "folder of images", "--data")
        Traceback (most recent call last):
        ...
        ValueError: --data: there is no folder of images '/nowhere': give one that is there
    """
    head = f"{name}: " if name else ""
    try:
        path.stat()
    except FileNotFoundError:
        raise ValueError(f"{head}there is no {what} {str(path)!r}: give one that is there") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{head}{str(path)!r} cannot be read ({_why(error)}): give another {what}") from None
    return path


def check_folder(path: Path, files: Sequence[str] = ()) -> Path:
    """Make sure that files can be written into a folder, which need not be there yet; nothing is made.

    Args:
        path: of the folder.
        files: names that will be written; what has one of them must be a file.

    Raises:
        ValueError: it cannot be made, or written to.
    """
    nearest = path
    try:
        while not os.path.lexists(nearest) and nearest != nearest.parent:
            _absent(nearest)
            nearest = nearest.parent
        if not nearest.is_dir():
            raise NotADirectoryError(f"{str(nearest)!r} is no folder")
        with tempfile.TemporaryFile(dir=nearest):
            pass
        for name in files:
            _check_replaceable(path / name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the output folder {str(path)!r} cannot be used ({_why(error)}): give one that can be written to"
        ) from None
    return path


def check_file(path: Path) -> Path:
    """Make sure that a file can be written, in a folder that is there; nothing is made.

    Raises:
        ValueError: it cannot.
    """
    try:
        if not path.parent.is_dir():
            raise ValueError(f"the folder {str(path.parent)!r} for the output does not exist: create it first")
        if not path.name:
            raise IsADirectoryError("it is a folder")
        _check_replaceable(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"the output {str(path)!r} cannot be written ({_why(error)}): give another file") from None
    return path


def _check_replaceable(path: Path) -> None:
    """A file that a new one can take the place of: not there, or a plain file; devices would be lost."""
    _absent(path.with_name(_TEMPORARY + path.name))
    if os.path.lexists(path) and not path.is_file():
        raise OSError(f"{path.name!r} is there and is no file")


def _absent(path: Path) -> None:
    """Raises what a path has wrong with it, apart from being absent."""
    with suppress(FileNotFoundError):
        path.lstat()


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
