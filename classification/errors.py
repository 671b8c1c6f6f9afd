"""User mistakes as one sentence and exit code 2, and files that are either written whole or not at all."""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from classification.images import UnreadableImages
from revnets.training.integrity import NotWritten, writing
from revnets.training.termination import TERMINATED, Terminated

USER_ERROR = 2
INTERRUPTED = 130


class UserError(Exception):
    """A mistake of the user: the message names the value, what was expected, and the fix."""


def one_line(error: BaseException) -> str:
    """The message of an exception as one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def guarded(run: Callable[[], object]) -> int:
    """Runs a script body and turns how it ended into an exit code.

    Args:
        run: The body; what it returns is ignored.

    Returns:
        0, or 2 after a user mistake or a full disk (printed as one line), or 130 after Ctrl-C, or 75 after SIGTERM.
        Other exceptions are bugs and pass.
    """
    try:
        run()
    except (UserError, UnreadableImages, NotWritten) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except Terminated as ended:
        print(ended.message, file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("stopped by the keyboard: `--resume auto` goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    finally:
        _leave_process_group()
    return 0


def _leave_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


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
