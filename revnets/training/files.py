"""Files that are either written whole or not at all, and why one could not be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class NotWritten(OSError):
    """A file could not be written, for want of space mostly; what was there before is whole."""

    def __init__(self, path: str | Path, error: BaseException) -> None:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno):
            cause = cause.__cause__ or cause.__context__  # torch's writer hides it behind an error of its own
        reason = cause.strerror if isinstance(cause, OSError) else " ".join(str(error).split())[:120]
        super().__init__(
            f"'{path}' cannot be written ({reason}): free space there, or give another folder; what was saved before "
            "is whole"
        )


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

    The temporary name keeps the ending of `path`, since some writers choose the format by it.

    Args:
        path: The file to write; its folder must exist.

    Yields:
        The path to write to.

    Raises:
        NotWritten: There is no space, say.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix="-" + path.name)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp's are private; a log folder is for everyone the umask lets in
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # else a machine that loses power may keep the name and not the content
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
