"""Values that somebody typed or passed: what they may be is declared once, for the command line and for functions.

All errors here are ``ValueError`` with one sentence that names the value, what was expected, and the fix.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UserError, did_you_mean, one_line
from .files import NotWritten

if TYPE_CHECKING:
    import torch

_LONGEST = 300  # letters of somebody else's message


@dataclass(frozen=True)
class Number:
    """A kind of number: its type and its range. Never NaN, never infinite.

    Args:
        kind: ``int`` or ``float``.
        low: the lowest, or what all have to exceed, see ``above``.
        high: the highest.
        above: whether ``low`` itself is too low.
        below: whether ``high`` itself is too high.
        example: for messages.

    Example:
        >>> Number(int, 1, 8).check("threads", 4)
        4
        >>> Number(float, 0, above=True, example="0.5").check("tolerance", float("nan"))
        Traceback (most recent call last):
        ...
        ValueError: tolerance=nan: expected a number above 0, such as 0.5
    """

    kind: type[int] | type[float]
    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    example: str = ""

    @property
    def words(self) -> str:
        """What is expected."""
        what = "a whole number" if self.kind is int else "a number"
        if self.low == -math.inf:
            return "a finite number"
        limit = f"{what} above {self.low:g}" if self.above else f"{what} from {self.low:g} on"
        if self.high != math.inf:
            start = "above" if self.above else "from"
            limit = f"{what} {start} {self.low:g} {'up to, not including,' if self.below else 'to'} {self._high}"
        return limit + (f", such as {self.example}" if self.example else "")

    @property
    def _high(self) -> str:
        return str(self.high) if self.kind is int else f"{self.high:g}"

    def holds(self, value: Any) -> bool:
        """Whether the value is one of these."""
        like: Any = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, like) or not math.isfinite(value):
            return False
        return bool(
            (self.low < value if self.above else self.low <= value)
            and (value < self.high if self.below else value <= self.high)
        )

    def check(self, name: str, value: Any) -> Any:
        """The value, of the right type.

        Raises:
            ValueError: it is another one; begins with ``name=value``.
        """
        if not self.holds(value):
            raise ValueError(f"{name}={value!r}: expected {self.words}")
        return self.kind(value)

    def read(self, text: Any) -> Any:
        """The value of a text; a value that is none is checked only.

        Raises:
            ValueError: for what is no such number; begins with the text.
        """
        value = text
        with suppress(ValueError, OverflowError):
            value = self.kind(text) if isinstance(text, str) else text
        if not self.holds(value):
            raise ValueError(f"{_short(text)}: expected {self.words}")
        return self.kind(value)

    def read_list(self, name: str, text: str) -> list[Any]:
        """The values of a text such as ``1,2,4``.

        Raises:
            ValueError: for none, for one that is no such number, and for one that is there twice.
        """
        try:
            found = [self.read(word) for word in words(name, text)]
        except ValueError as error:
            problem = str(error) if str(error).startswith(name) else f"{name} {_short(text)}: {error}"
            raise ValueError(f"{problem}; numbers are separated by commas") from None
        check_once(f"{name} {_short(text)}", found)
        return found


COUNT = Number(int, 1, 2**31 - 1)
"""Images, steps, sizes, whatever is counted."""
SEED = Number(int, 0, 2**64 - 1)
"""What ``torch.Generator.manual_seed`` takes, without negative ones."""
THREADS = Number(int, 1, 1024)
POSITIVE = Number(float, 0, above=True)
FINITE = Number(float, -math.inf)
NOT_NEGATIVE = Number(float, 0)
SHARE = Number(float, 0, 1)
SPARSITY = Number(float, 0, 1, below=True, example="0.75")
"""As ``revnets.sparsity`` takes it."""


def check_once(name: str, items: Sequence[Any]) -> None:
    """Make sure that nothing is there twice.

    Raises:
        ValueError: for the first that is.
    """
    for item in items:
        if list(items).count(item) > 1:
            raise ValueError(f"{name}: {_short(item)} is there twice, give it once")


def words(name: str, text: str, known: Collection[str] = (), blanks: bool = True) -> list[str]:
    """The items of a list that was typed, in order.

    Args:
        name: of the option, for messages.
        text: items separated by commas.
        known: what there may be; none for anything.
        blanks: whether blanks separate items, too.

    Raises:
        ValueError: for a list of nothing, an empty, doubled or unknown item.

    Example:
        >>> words("--mode", "store, checkpoint", ("store", "checkpoint"))
        ['store', 'checkpoint']
    """
    some = f"some of {', '.join(known)}" if known else "at least one"
    found: list[str] = []
    for item in text.split(","):
        if not item.strip():
            raise ValueError(f"{name} {_short(text)}: an item is empty, expected {some}, separated by commas")
        found += item.split() if blanks else [item.strip()]
    for item in found:
        if known and item not in known:
            raise ValueError(f"unknown {name} {_short(item)}: expected {some}{did_you_mean(item, known)}")
    check_once(f"{name} {_short(text)}", found)
    return found


def check_choice(name: str, value: Any, known: Collection[str]) -> Any:
    """The value, if it is one of the known ones.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or value not in known:
        near = did_you_mean(value, known) if isinstance(value, str) else ""
        raise ValueError(f"{name}={_short(value)}: expected one of {', '.join(known)}{near}")
    return value


def find_device(name: Any, here: bool) -> torch.device:
    """The device of that name.

    Args:
        name: as torch spells it, such as ``cuda:0``.
        here: whether it has to be at hand.

    Raises:
        ValueError: there is none of that name, or it cannot be used here.

    Example:
        >>> find_device("cpu", here=True)
        device(type='cpu')
    """
    import torch  # late: `revnets --help` needs none

    try:
        device = torch.device(name)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise ValueError
        torch.get_device_module(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"unknown device {_short(name)}: expected cpu, cuda, cuda:0, ...") from None
    if here:
        with refused(f"device {_short(name)} cannot be used here"):
            torch.zeros(1, device=device)
    return device


@contextmanager
def refused(what: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """The door to other libraries: what timm or torch refuses in the block becomes one sentence.

    To be put around the call into the library alone (a network is built, moved, run for the first time), where
    whatever is raised is due to what was asked for.

    Args:
        what: the beginning of the sentence.
        kind: of the error.

    Raises:
        kind: for any exception of the block; what is of that kind, or ours already, passes as it is.
    """
    try:
        yield
    except (UserError, NotWritten):
        raise
    except Exception as error:
        if kind is not ValueError and isinstance(error, kind):
            raise
        raise kind(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an exception says, on one line, without C++ frames; its type where that alone says it.

    Example:
        >>> reason(KeyError("a")), reason(AssertionError())
        ("KeyError 'a'", 'AssertionError')
    """
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = first[:_LONGEST].rstrip(" :")
    return f"{type(error).__name__} {text}".strip() if not text or isinstance(error, KeyError) else text


def _short(value: Any) -> str:
    text = one_line(ValueError(repr(value)))
    return text if len(text) <= 100 else f"{text[:90]}...{text[-1]}"
