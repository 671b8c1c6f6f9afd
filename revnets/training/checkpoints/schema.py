"""What a tree of plain values must look like, declared once and checked before any of it is used.

A file of somebody else's may have right checksums and odd values, such as text where a number belongs. ``tree.sound``
looks at the whole of it; the kinds that are declared here, at the entries that somebody uses.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..options.values import in_words
from .tree import Mismatch, Path, described, unusable

_WHOLE = 1 << 53  # whole numbers beyond it are none that a run counts


class Kind:
    """What one entry may be. Kinds are values: compose them, and keep them as constants."""

    words = "anything"

    def takes(self, value: Any) -> bool:
        """Whether the value is of the right type, be its contents right or not."""
        return True

    def check(self, value: Any, path: Path = ()) -> None:
        """Refuse a value that is none of these.

        Raises:
            Mismatch: Naming the first entry that is odd.
        """
        if not self.takes(value):
            raise expected(path, value, self.words)


@dataclass(frozen=True)
class Nothing(Kind):
    """None."""

    words = "nothing"

    def takes(self, value: Any) -> bool:
        """Only None."""
        return value is None


@dataclass(frozen=True)
class Flag(Kind):
    """True or False."""

    words = "true or false"

    def takes(self, value: Any) -> bool:
        """Only a bool."""
        return isinstance(value, bool)


@dataclass(frozen=True)
class Text(Kind):
    """Text, of some words only if there are any."""

    choices: tuple[str, ...] = ()

    @property
    def words(self) -> str:  # type: ignore[override]
        """For the message."""
        return "one of " + ", ".join(self.choices) if self.choices else "text"

    def takes(self, value: Any) -> bool:
        """Only a str."""
        return isinstance(value, str)

    def check(self, value: Any, path: Path = ()) -> None:
        """See ``Kind.check``."""
        super().check(value, path)
        if self.choices and value not in self.choices:
            raise expected(path, value, self.words)


@dataclass(frozen=True)
class Number(Kind):
    """A number within bounds that may be reached; never a bool.

    Attributes:
        low: The lowest.
        high: The highest.
        whole: Only ints.
        finite: Neither NaN nor infinite.
        above: It must be higher than ``low``.
    """

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    finite: bool = True
    above: bool = False

    @property
    def words(self) -> str:  # type: ignore[override]
        """For the message."""
        return in_words(self.whole, self.low, self.high, self.above)

    def takes(self, value: Any) -> bool:
        """Only an int or, unless whole ones are wanted, a float."""
        return isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)

    def check(self, value: Any, path: Path = ()) -> None:
        """See ``Kind.check``."""
        super().check(value, path)
        if isinstance(value, int):
            nan, fits = False, abs(value) <= _WHOLE
        else:
            nan, fits = math.isnan(value), math.isfinite(value) or not self.finite
        low = value > self.low if self.above else value >= self.low
        if not (fits and (nan or (low and value <= self.high))):
            odd = isinstance(value, float) and not math.isfinite(value)
            raise expected(path, value, self.words.replace("number", "finite number", 1) if odd else self.words)


@dataclass(frozen=True)
class Array(Kind):
    """A tensor with memory of its own kind.

    Attributes:
        shape: That it must have; None: any.
        dtypes: ``any``, ``floating``, ``whole`` (ints, bools not) or ``bool``.
        finite: ``any``, or ``weights``: no NaN, and infinity only beside zeros, as in a mask of attention; or ``all``.
        dim: How many dimensions it must have; None: any.
    """

    shape: tuple[int, ...] | None = None
    dtypes: str = "any"
    finite: str = "any"
    dim: int | None = None

    @property
    def words(self) -> str:  # type: ignore[override]
        """For the message."""
        kind = {"any": "", "floating": " of floating point", "whole": " of whole numbers", "bool": " of true and false"}
        shape = "" if self.shape is None else f" of shape {self.shape}"
        return f"a tensor{kind[self.dtypes]}{shape}" + ("" if self.dim is None else f" of {self.dim} dimensions")

    def takes(self, value: Any) -> bool:
        """Only a tensor."""
        return isinstance(value, Tensor)

    def check(self, value: Any, path: Path = ()) -> None:
        """See ``Kind.check``."""
        super().check(value, path)
        if problem := unusable(value):
            raise Mismatch(path, f"is {problem}, an ordinary tensor was expected")
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        right = {"floating": value.is_floating_point(), "whole": whole, "bool": value.dtype == torch.bool}
        fits = self.shape in (None, tuple(value.shape)) and self.dim in (None, value.dim())
        if not (fits and right.get(self.dtypes, True)):
            raise expected(path, value, self.words)
        if self.finite != "any" and not _finite(value, self.finite):
            raise Mismatch(path, "holds NaN or infinity, finite numbers were expected")


@dataclass(frozen=True)
class Items(Kind):
    """A list or tuple of one kind.

    Attributes:
        item: The kind.
        length: How many; None: any.
    """

    item: Kind
    length: int | None = None

    @property
    def words(self) -> str:  # type: ignore[override]
        """For the message."""
        return "a list" if self.length is None else f"a list of {self.length}"

    def takes(self, value: Any) -> bool:
        """Only a list or tuple."""
        return isinstance(value, (list, tuple))

    def check(self, value: Any, path: Path = ()) -> None:
        """See ``Kind.check``."""
        super().check(value, path)
        if self.length not in (None, len(value)):
            raise expected(path, value, self.words)
        for index, each in enumerate(value):
            self.item.check(each, (*path, index))


@dataclass(frozen=True)
class Row(Kind):
    """A list or tuple with a kind for each place."""

    items: tuple[Kind, ...]

    @property
    def words(self) -> str:  # type: ignore[override]
        """For the message."""
        return f"a list of {len(self.items)}"

    def takes(self, value: Any) -> bool:
        """Only a list or tuple."""
        return isinstance(value, (list, tuple))

    def check(self, value: Any, path: Path = ()) -> None:
        """See ``Kind.check``."""
        super().check(value, path)
        if len(value) != len(self.items):
            raise expected(path, value, self.words)
        for index, (kind, each) in enumerate(zip(self.items, value, strict=True)):
            kind.check(each, (*path, index))


@dataclass(frozen=True)
class Mapped(Kind):
    """A mapping, all keys of one kind and all values of another.

    Attributes:
        key: Of the keys.
        value: Of the values.
        words: For the message.
        filled: It must not be empty.
    """

    key: Kind
    value: Kind
    words: str = "a mapping"
    filled: bool = False

    def takes(self, value: Any) -> bool:
        """Only a mapping."""
        return isinstance(value, Mapping)

    def check(self, value: Any, path: Path = ()) -> None:
        """See ``Kind.check``."""
        super().check(value, path)
        if self.filled and not value:
            raise expected(path, value, self.words)
        for key, each in value.items():
            if not self.key.takes(key):
                raise Mismatch(path, f"has the key {described(key)}, {self.key.words} was expected")
            self.value.check(each, (*path, key))


@dataclass(frozen=True)
class Record(Kind):
    """A mapping of known names. Names that nobody knows are passed over, people add things; what is no name is not.

    Attributes:
        required: Kinds of what must be there.
        optional: Kinds of what may be.
    """

    required: Mapping[str, Kind] = field(default_factory=dict)
    optional: Mapping[str, Kind] = field(default_factory=dict)
    words = "a mapping"

    def takes(self, value: Any) -> bool:
        """Only a mapping."""
        return isinstance(value, Mapping)

    def check(self, value: Any, path: Path = ()) -> None:
        """See ``Kind.check``."""
        super().check(value, path)
        for key in value:
            if not isinstance(key, str):
                raise Mismatch(path, f"has the key {described(key)}, text was expected")
        for name, kind in self.required.items():
            if name not in value:
                raise Mismatch((*path, name), f"is missing, {kind.words} was expected")
            kind.check(value[name], (*path, name))
        for name, kind in self.optional.items():
            if name in value:
                kind.check(value[name], (*path, name))


@dataclass(frozen=True)
class Either(Kind):
    """One of several kinds: the first whose type it is."""

    kinds: tuple[Kind, ...]

    @property
    def words(self) -> str:  # type: ignore[override]
        """For the message."""
        return " or ".join(kind.words for kind in self.kinds)

    def takes(self, value: Any) -> bool:
        """What any of them takes."""
        return any(kind.takes(value) for kind in self.kinds)

    def check(self, value: Any, path: Path = ()) -> None:
        """See ``Kind.check``."""
        super().check(value, path)
        next(kind for kind in self.kinds if kind.takes(value)).check(value, path)


@dataclass(frozen=True)
class Such(Kind):
    """A kind with a further condition.

    Attributes:
        kind: Checked first.
        problem: Gives what is wrong with a value of this kind, to follow its path in a sentence; or nothing.
    """

    kind: Kind
    problem: Callable[[Any], str]

    @property
    def words(self) -> str:  # type: ignore[override]
        """For the message."""
        return self.kind.words

    def takes(self, value: Any) -> bool:
        """What the kind takes."""
        return self.kind.takes(value)

    def check(self, value: Any, path: Path = ()) -> None:
        """See ``Kind.check``."""
        self.kind.check(value, path)
        if problem := self.problem(value):
            raise Mismatch(path, problem)


ANYTHING, NOTHING, TEXT, FLAG = Kind(), Nothing(), Text(), Flag()
COUNT = Number(0, whole=True)


def optional(kind: Kind) -> Either:
    """The kind, or None."""
    return Either((NOTHING, kind))


def expected(path: Path, value: Any, words: str) -> Mismatch:
    """The error for a value that is there but odd."""
    return Mismatch(path, f"is {described(value)}, {words} was expected")


def _finite(tensor: Tensor, finite: str) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()  # no isfinite for float8
    good = values.isfinite()
    if bool(good.all()):
        return True
    return finite == "weights" and not bool(values.isnan().any()) and not bool(values[good].any())
