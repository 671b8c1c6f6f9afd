"""User mistakes as one sentence and exit code 2."""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .files import NotWritten
from .termination import TERMINATED, Terminated

USER_ERROR = 2
INTERRUPTED = 130
_LONGEST, _LONGEST_REASON = 2000, 300  # letters of a sentence, and of another library's part of it
_FRAMES = re.compile(r"\n(Exception raised from|C\+\+ CapturedTraceback|frame #)")


class UserError(Exception):
    """A mistake of the user: the message names the value, what was expected, and the fix."""


def one_line(error: BaseException) -> str:
    """The message of an exception as one line, cut in the middle where it is endless; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def reason(error: BaseException) -> str:
    """What another library says, in short and on one line, without C++ frames; its type where that alone says it.

    Example:
        >>> reason(KeyError("a")), reason(AssertionError())
        ("KeyError 'a'", 'AssertionError')
    """
    text = " ".join(_FRAMES.split(str(error), maxsplit=1)[0].split()).rstrip(" :.")
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    return f"{type(error).__name__} {text}".strip() if not text or isinstance(error, KeyError) else text


def shown(value: object) -> str:
    """A value that somebody gave as messages show it: its `repr`, cut in the middle where it is long or deep."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, 120, 120, 40
    try:
        return " ".join(short.repr(value).split())
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"a {type(value).__name__} of too many digits"


@contextmanager
def refused(what: str, fix: str = "", kind: type[Exception] = UserError) -> Iterator[None]:
    """The door to other libraries: whatever they raise in the block is a mistake in what was asked of them.

    It goes around single calls into timm, torch or MMEngine that get somebody's values, and around nothing of ours.

    Args:
        what: The beginning of the sentence: the option, and what is done with it.
        fix: The end of it, if there is more to say than that.
        kind: Of the error.

    Raises:
        kind: With the library's own words; what is of that kind, or ours already, passes as it is.

    Example:
        >>> with refused("--opt: adam refuses its arguments", "correct --opt-kwargs"):
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
        if kind is not ValueError and isinstance(error, kind):
            raise
        raise kind(f"{what} ({reason(error)}); {fix}." if fix else f"{what}: {reason(error)}") from error


def guarded(run: Callable[[], object], program: str = "") -> int:
    """Runs a script body and turns how it ended into an exit code.

    Args:
        run: The body; what it returns is ignored.
        program: The command that runs it, whose first word begins its sentences.

    Returns:
        0, or 2 after a user mistake or a full disk (printed as one line), or 130 after Ctrl-C, or 75 after SIGTERM.
        Other exceptions are bugs and pass.
    """
    try:
        run()
    except (UserError, NotWritten) as error:
        print(f"{program.partition(' ')[0] or 'error'}: {one_line(error)}", file=sys.stderr)
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
