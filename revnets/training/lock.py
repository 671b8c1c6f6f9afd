"""One run per folder: a lock that its process holds, and that the kernel takes from it when it dies."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

from .errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_logger = logging.getLogger("revnets")
NAME = ".revnets.lock"
_TEXT = re.compile(r"process (\d{1,20}) on (\S{1,255}) since (\S+ \S+)\n")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that know none
_TRIES, _PAUSE = 20, 0.05  # a second for a run that is just ending, or a process that is just dying
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class InUse(UserError):
    """Another run is in the folder now."""


class FolderLock:
    """Holds a folder for one run, against other processes and other runs of this one, until it is released.

    The lock is the kernel's, on an open file (``flock``): it ends with the process, however that dies, so that a file
    which a crash left behind stops nobody. Processes that load data, forks of this one, do not hold it. The file says
    who has it. It goes when the lock is released, and so do folders that were made for it and are still empty.

    Args:
        folder: Made where it is missing.
        remedy: What a user may do other than wait, for messages.

    Raises:
        InUse: Another run has it.
        UserError: The folder cannot be made or written to, or something else has the name of the lock.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with FolderLock(Path(parent, "run")) as lock:
        ...         print([path.name for path in lock.folder.iterdir()])
        ...     print(list(Path(parent).iterdir()))
        ['.revnets.lock']
        []
    """

    def __init__(self, folder: Path, remedy: str = "give another folder") -> None:
        self.folder, self.path, self._remedy = folder, folder / NAME, remedy
        self.known = True  # the file system knows locks
        self._made: list[Path] = []
        self._process, self._handle = os.getpid(), -1
        try:
            self._handle = self._take()
        except OSError as error:
            raise UserError(f"'{folder}' cannot be used for a run ({error.strerror}); {remedy}.") from error
        finally:
            if self._handle < 0:
                self._remove_folders()

    def release(self) -> None:
        """Gives the folder back; there is nothing to do where that was done."""
        if self._handle < 0 or os.getpid() != self._process:
            return
        handle, self._handle = self._handle, -1
        with suppress(OSError):  # of a folder that was moved or made read-only meanwhile
            if sys.platform != "win32" and _same(handle, self.path):
                self.path.unlink()  # while it is held: who opens the name from now on makes another file
        _held.pop(handle, None)
        os.close(handle)
        if sys.platform == "win32":  # where no open file can be removed
            with suppress(OSError):
                self.path.unlink()
        self._remove_folders()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self) -> int:
        """The descriptor of the locked file."""
        holder = "another run"
        for _ in range(_TRIES):
            self._make_folders()
            try:
                handle, writable = _open(self.path)
            except FileNotFoundError:  # its holder removed file and folder since
                continue
            kept = False
            try:
                if not self._lock(handle):
                    holder = _holder(handle) or holder
                elif _same(handle, self.path):  # its holder did not remove it between open and lock
                    if writable:
                        _sign(handle, self._process)
                        _held[handle], kept = self, True
                        return handle
                    self.path.unlink()  # another user's, left behind by a crash
                    continue
            finally:
                if not kept:
                    os.close(handle)
            time.sleep(_PAUSE)
        raise InUse(f"'{self.folder}' is in use by {holder}; wait until that run ends, or {self._remedy}.")

    def _lock(self, handle: int) -> bool:
        try:
            if sys.platform == "win32":
                os.lseek(handle, 1 << 20, os.SEEK_SET)  # others can read what is not locked
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.known = False
            _logger.warning(
                f"'{self.folder}' is on a file system without locks ({error.strerror}): see to it yourself that no "
                "other run uses the folder"
            )
        return True

    def _make_folders(self) -> None:
        missing = []
        folder = self.folder
        while not folder.exists() and folder != folder.parent:
            missing.append(folder)
            folder = folder.parent
        self._made = list(dict.fromkeys([*self._made, *missing]))
        self.folder.mkdir(parents=True, exist_ok=True)

    def _remove_folders(self) -> None:
        for folder in self._made:  # the innermost first
            with suppress(OSError):  # of one that is in use
                folder.rmdir()
        self._made = []


_held: dict[int, FolderLock] = {}  # by descriptor; of this process


def held_here(folder: Path) -> FolderLock | None:
    """The lock of a folder, where this process holds it.

    Args:
        folder: Of a run.
    """
    return next((lock for handle, lock in _held.items() if _same(handle, folder / NAME)), None)


def _open(path: Path) -> tuple[int, bool]:
    """The descriptor of the lock's file, made where it is missing, and whether it can be written to.

    Raises:
        UserError: There is something else, such as a link or a file with other content.
    """
    writable = True
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
    except PermissionError:
        if not path.is_file() or path.is_symlink():
            raise
        handle, writable = os.open(path, os.O_RDONLY | _FLAGS), False
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise _foreign(path) from error
    file = os.fstat(handle)
    text = os.read(handle, 8) if stat.S_ISREG(file.st_mode) else b"-"
    if file.st_nlink > 1 or (text and text != b"process "):
        os.close(handle)
        raise _foreign(path)
    return handle, writable


def _foreign(path: Path) -> UserError:
    return UserError(f"'{path}' is something else than the lock of a run; move it away, or give another folder.")


def _sign(handle: int, process: int) -> None:
    host = "".join(socket.gethostname().split()) or "this-host"
    text = f"process {process} on {host} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode()
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, text)
    os.ftruncate(handle, len(text))


def _holder(handle: int) -> str:
    """Who has the lock, in words; nothing before it has said so."""
    os.lseek(handle, 0, os.SEEK_SET)
    found = _TEXT.match(os.read(handle, 512).decode(errors="replace"))
    text = found[0].strip() if found else ""
    return text if text.isprintable() else ""


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False


def _let_go() -> None:
    """In a fork: else a process that loads data would keep the lock of a run that was killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
