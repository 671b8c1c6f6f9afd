"""Values that somebody typed or passed: what they may be is declared once, for the command line and for functions.

All errors here are ``ValueError`` with one sentence that names the value, what was expected, and the fix.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import did_you_mean, refused, shown

if TYPE_CHECKING:
    import torch


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
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    example: str = ""

    @property
    def words(self) -> str:
        """What is expected."""
        what = in_words(self.kind is int, self.low, self.high, self.above, self.below)
        return what + (f", such as {self.example}" if self.example else "")

    def holds(self, value: Any) -> bool:
        """Whether the value is one of these."""
        like: Any = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, like) or not abs(value) <= sys.float_info.max:
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
            raise ValueError(f"{name}={shown(value)}: expected {self.words}")
        return self.kind(value)

    def read(self, text: Any) -> Any:
        """The value of a text; a value that is none is checked only.

        Raises:
            ValueError: for what is no such number; begins with the text.
        """
        value = text
        if isinstance(text, str) and text.isascii() and "_" not in text:
            with suppress(ValueError):
                value = self.kind(text)
        if not self.holds(value):
            raise ValueError(f"{shown(text)}: expected {self.words}")
        return self.kind(value)

    def read_list(self, name: str, text: str) -> list[Any]:
        """The values of a text such as ``1,2,4``.

        Raises:
            ValueError: for none, for one that is no such number, and for one that is there twice.
        """
        try:
            found = [self.read(word) for word in words(name, text)]
        except ValueError as error:
            problem = str(error) if str(error).startswith(name) else f"{name} {shown(text)}: {error}"
            raise ValueError(f"{problem}; numbers are separated by commas") from None
        check_once(f"{name} {shown(text)}", found)
        return found


def in_words(whole: bool, low: float, high: float, above: bool = False, below: bool = False) -> str:
    """What numbers a range holds, in words.

    Example:
        >>> in_words(True, 1, 8), in_words(False, 0, math.inf, above=True)
        ('a whole number of at least 1 and at most 8', 'a number above 0')
    """
    least, most = (str(n) if isinstance(n, int) else f"{n:.12g}" for n in (low, high))
    bounds = [f"above {least}" if above else f"of at least {least}"] if low > -math.inf else []
    if high < math.inf:
        bounds.append(f"below {most}" if below else f"{'' if bounds and not above else 'of '}at most {most}")
    return " ".join(["a", *(["whole"] if whole else []), "number", " and ".join(bounds)]).strip()


COUNT = Number(int, 1, 2**31 - 1)
"""Images, steps, sizes, whatever is counted."""
SEED = Number(int, 0, 2**64 - 1)
"""What ``torch.Generator.manual_seed`` takes, without negative ones."""
THREADS = Number(int, 1, 1024)
POSITIVE = Number(float, 0, above=True)
FINITE = Number(float)
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
            raise ValueError(f"{name}: {shown(item)} is there twice, give it once")


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
            raise ValueError(f"{name} {shown(text)}: an item is empty, expected {some}, separated by commas")
        found += item.split() if blanks else [item.strip()]
    for item in found:
        if known and item not in known:
            raise ValueError(f"unknown {name} {shown(item)}: expected {some}{did_you_mean(item, known)}")
    check_once(f"{name} {shown(text)}", found)
    return found


def check_choice(name: str, value: Any, known: Collection[str]) -> Any:
    """The value, if it is one of the known ones.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or value not in known:
        near = did_you_mean(value, known) if isinstance(value, str) else ""
        raise ValueError(f"{name}={shown(value)}: expected one of {', '.join(known)}{near}")
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
        raise ValueError(f"unknown device {shown(name)}: expected cpu, cuda, cuda:0, ...") from None
    if here:
        with refused(f"device {shown(name)} cannot be used here", kind=ValueError):
            torch.zeros(1, device=device)
    return device
