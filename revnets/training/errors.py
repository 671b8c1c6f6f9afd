"""User mistakes as one sentence and exit code 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable

from .files import NotWritten
from .termination import TERMINATED, Terminated

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
    except (UserError, NotWritten) as error:
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
