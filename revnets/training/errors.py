"""User mistakes as one sentence and exit code 2."""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .files import NotWritten
from .termination import TERMINATED, Terminated

USER_ERROR = 2
INTERRUPTED = 130
LONGEST = 400  # characters of another library's message that are passed on


class UserError(Exception):
    """A mistake of the user: the message names the value, what was expected, and the fix."""


def one_line(error: BaseException) -> str:
    """The message of an exception as one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value: object) -> str:
    """A value as an error message shows it: its `repr`, cut in the middle where it is long or deep."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, 120, 120, 40
    try:
        return short.repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"a {type(value).__name__} of too many digits"


@contextmanager
def refusals(what: str, fix: str) -> Iterator[None]:
    """The door to another library: whatever it raises inside is a mistake in what the user asked of it.

    It goes around single calls into timm, torch or MMEngine that get the user's values, and around nothing of ours.

    Args:
        what: The option, and what is done with it.
        fix: What to do about it.

    Raises:
        UserError: With the library's own words.

    Example:
        >>> with refusals("--opt: adam refuses its arguments", "correct --opt-kwargs"):
        ...     raise ValueError("bad beta")
        Traceback (most recent call last):
        ...
        revnets.training.errors.UserError: --opt: adam refuses its arguments (bad beta); correct --opt-kwargs.
    """
    try:
        yield
    except (UserError, NotWritten):
        raise
    except Exception as error:
        words = one_line(error)
        words = words if len(words) <= LONGEST else f"{words[:LONGEST]}..."
        raise UserError(f"{what} ({words.rstrip('.')}); {fix}.") from error


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
