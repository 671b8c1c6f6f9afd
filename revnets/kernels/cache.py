"""Where compiled kernels are kept, and which of them may be loaded: nothing that somebody else could have written.

A kernel is code that runs in this process. It is loaded only from a file that this user or root owns and nobody else
may write, in a folder of which the same is true, below folders in which nobody else can exchange it. A file ends with a
checksum, which is compared before the file is loaded: one that was cut off would end the process.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

CACHE_VARIABLE = "REVNETS_CACHE"
MAX_BYTES = 2**26  # of a library; the kernel has less than a thousandth of that

_MAGIC = b"\nrevnets kernel "
_SEAL = len(_MAGIC) + 64  # and the checksum in hexadecimal digits


class NotTrusted(OSError):
    """A folder or a file that is not used, and why, in words."""


class Damaged(OSError):
    """A file that is not what was written: to be made anew."""


# --- folders ---------------------------------------------------------------------------------------------------------


def folders(problems: list[str]) -> Iterator[Path]:
    """Folders for compiled kernels, the first choice first.

    They are ``$REVNETS_CACHE``, else ``revnets`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``), and
    after it ``revnets-UID`` in the folder for temporary files. They exist, but may be read-only: one that root has
    prepared for all users of a machine.

    Args:
        problems: why a folder cannot be used is added here.
    """
    for find in (_chosen, _temporary):
        try:
            yield find()
        except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
            problems.append(str(error))


def _chosen() -> Path:
    """The folder that the user names, or the usual one; made where it does not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        folder = Path(named).expanduser()
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "revnets"
    real = Path(os.path.realpath(folder))
    missing = [path for path in (real, *real.parents) if not os.path.lexists(path)]
    _check_parents(missing[-1] if missing else real)
    for path in reversed(missing):  # private from the first moment, whatever the umask
        path.mkdir(mode=0o700, exist_ok=True)
    _check_folder(real)
    return real


def _temporary() -> Path:
    """A folder of this user's in the one for temporary files, where others may have put something of that name."""
    folder = Path(os.path.realpath(tempfile.gettempdir())) / f"revnets-{os.getuid()}"
    _check_parents(folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink():
        raise NotTrusted(f"{folder} is a symbolic link: set {CACHE_VARIABLE} to a folder of your own")
    _check_folder(folder)
    return folder


def _check_folder(folder: Path) -> None:
    """Whether what lies in a folder, in whose place nobody can put another, is of nobody else's making."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_owner(folder, os.fstat(handle))
        if os.fstatvfs(handle).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise NotTrusted(f"{folder} is on a file system without programs (noexec): set {CACHE_VARIABLE} elsewhere")
    finally:
        os.close(handle)


def _check_parents(folder: Path) -> None:
    """From the root down: once a folder is known to be safe, nobody exchanges those in it."""
    for parent in reversed(folder.parents):
        found = os.lstat(parent)
        if not stat.S_ISDIR(found.st_mode):
            raise NotTrusted(f"{parent} is not a folder: set {CACHE_VARIABLE} to one of your own")
        if not found.st_mode & stat.S_ISVTX:  # in a sticky folder names belong to their owners
            _check_owner(parent, found, private_group=True)
        elif found.st_uid not in (0, os.getuid()):
            raise NotTrusted(f"{parent} belongs to user {found.st_uid}: set {CACHE_VARIABLE} to a folder of your own")


def _check_owner(path: Path, found: os.stat_result, private_group: bool = False) -> None:
    mode, writers = stat.S_IMODE(found.st_mode), stat.S_IWGRP | stat.S_IWOTH
    if found.st_uid not in (0, os.getuid()):
        raise NotTrusted(
            f"{path} belongs to user {found.st_uid}, this process to {os.getuid()}: "
            f"set {CACHE_VARIABLE} to a folder of your own"
        )
    if private_group and not mode & stat.S_IWOTH and _is_private(found.st_gid):
        return
    if mode & writers:
        raise NotTrusted(
            f"{path} can be written by others (mode {mode:o}): chmod go-w it, "
            f"or set {CACHE_VARIABLE} to a folder of your own"
        )


def _is_private(group: int) -> bool:
    """Whether a group is this user's alone, as many distributions make one for each user, who shares it with nobody."""
    try:
        import grp
        import pwd

        user, found = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(group)
    except (ImportError, KeyError):
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


# --- files -----------------------------------------------------------------------------------------------------------


def open_kept(path: Path, key: str) -> int:
    """A library, opened, once it is known to be this user's or root's and to be what was written.

    What has been checked is the opened file: whoever loads it has to do so by this descriptor.

    Args:
        path: of the file, in a folder that was checked.
        key: what it was compiled from and for.

    Raises:
        FileNotFoundError: there is none.
        NotTrusted: others could have written it.
        Damaged: it was cut off, changed, or is of something else.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe does not answer
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{path} is not a file")
        _check_owner(path, found)
        if not _SEAL < found.st_size <= MAX_BYTES:
            raise Damaged(f"{path} has {found.st_size} bytes")
        content = _content(handle, found.st_size)
        if _sealed(content[:-_SEAL], key) != content:
            raise Damaged(f"{path} is damaged, or is not a library that revnets has made")
    except BaseException:
        os.close(handle)
        raise
    return handle


def _content(handle: int, size: int) -> bytes:
    parts, place = [], 0
    while place < size:
        part = os.pread(handle, size - place, place)
        if not part:
            break
        parts.append(part)
        place += len(part)
    return b"".join(parts)


def _sealed(library: bytes, key: str) -> bytes:
    """With the checksum behind it, which a loader does not read."""
    return library + _MAGIC + hashlib.sha256(key.encode() + b"\n" + library).hexdigest().encode()


def seal(source: Path, path: Path, key: str) -> None:
    """Write a compiled library with its checksum to a new file that only this user may read and write.

    Raises:
        OSError: it cannot be written, or there is a file.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as file:
        file.write(_sealed(source.read_bytes(), key))
        file.flush()
        os.fsync(file.fileno())
