"""Whether a checkpoint is still what was written."""

from __future__ import annotations

import hashlib
import logging
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line

_logger = logging.getLogger("revnets")


def damage(path: str | Path) -> str:
    """What is wrong with a file of ``torch.save``, in words; nothing where every checksum in it is right.

    The file is a zip archive, which holds a CRC-32 of each tensor's bytes and of the pickle: a truncated or overwritten
    file, or one with a flipped bit, is found without a second file that could be lost or be of another moment.

    Args:
        path: Of the file.

    Example:
        >>> damage(__file__)
        'it is truncated, or no checkpoint'
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, ValueError):  # RuntimeError: "encrypted", say
        return "it is truncated, or no checkpoint"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return "" if bad is None else f"the checksum of its part '{bad}' is wrong"


def is_archive(path: str | Path) -> bool:
    """Whether a file is a zip archive, damaged or not, as ``torch.save`` makes since 1.6.

    Example:
        >>> is_archive(__file__)
        False
    """
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one of several parts, as a flipped bit can say
        return True


def forbidden(error: BaseException) -> str:
    """What a checkpoint would have called when it was read, if that is why ``torch.load`` refused it; else nothing.

    Example:
        >>> forbidden(ValueError("Unsupported global: GLOBAL posix.system was not an allowed global by default."))
        'posix.system'
    """
    found = re.search(r"GLOBAL (\S+) was not an allowed", str(error)) or re.search(
        r"Unsupported class (\S+)", str(error)
    )
    return found[1] if found else ""


def refusal(error: BaseException) -> str:
    """Why torch refused to read a file, in words, without its advice to read it unsafely.

    Example:
        >>> refusal(ValueError("Weights only load failed. WeightsUnpickler error: Unsupported operand 66"))
        'Unsupported operand 66'
    """
    if code := forbidden(error):
        return f"reading it would run '{code}'"
    text = " ".join(str(error).split())
    text = text.partition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0] or text
    return (text.split(". ")[0] or type(error).__name__)[:160]


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Example:
        >>> len(sha256_of(__file__))
        64
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_whole(files: Sequence[Path], folder: Path, read: Callable[[Path, str], Any]) -> Path:
    """The first of some checkpoints that is whole and can be read; those before it are warned of.

    Args:
        files: The newest first.
        folder: Theirs.
        read: Reads one for an option, or raises UserError: checksums do not cover the directory of the archive.

    Raises:
        UserError: All are damaged.
    """

    def unreadable(path: Path) -> str:
        try:
            read(path, "--resume")
        except UserError as error:
            return one_line(error.__cause__ or error).split(". ")[0][:160]
        return ""

    for file in files:
        problem = damage(file) or unreadable(file)
        if not problem:
            return file
        _logger.warning(f"--resume: '{file}' is damaged ({problem}); trying the one before it")
    raise UserError(f"--resume: all checkpoints in '{folder}' are damaged or gone; start anew with --overwrite.")
