"""What one option may be: its type, range, choices, and what it needs; and the check of a value against that."""

from __future__ import annotations

import ast
import dataclasses
import errno
import itertools
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

from ..errors import UserError, did_you_mean, shown
from .values import Number

Choices = Sequence[str] | Callable[[], Sequence[str]]
WHOLE = 2**63  # what 64 bits hold, where an option says nothing else
_MANY = 12  # choices that are listed in a message; of more, the closest is
SEED = 2**32 - 1  # NumPy takes no larger one


@dataclasses.dataclass(frozen=True)
class Need:
    """What an option needs to have an effect.

    Args:
        holds: Whether it is there, given all options.
        lack: In words, what there is otherwise; names in braces are replaced by the values of options.
        fix: What to do, without a full stop.
        in_files: Whether a file is to have it, too; where not, a recipe may say what only some of its runs need.
    """

    holds: Callable[[Any], object]
    lack: str
    fix: str
    in_files: bool = True


def option(
    default: Any,
    help: str,
    *,
    flags: Sequence[str] = (),
    choices: Choices = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    length: tuple[int, int] | None = None,
    ascending: bool = False,
    path: bool = False,
    zero: bool = False,
    needs: Need | Sequence[Need] = (),
) -> Any:
    """A dataclass field that is also an option of the command line and a key of the YAML file.

    Args:
        default: Its value where nobody sets it.
        help: One line for `--help`.
        flags: Further spellings on the command line, such as `-b`.
        choices: The allowed words, or a function that names them when they are asked for; none means any.
        low: The lowest allowed number.
        high: The highest allowed number.
        above: Numbers must be larger than this.
        below: Numbers must be smaller than this.
        length: The fewest and the most values of a list.
        ascending: Whether the values of a list must not fall.
        path: Whether it names a file or a folder; `~` then stands for the home folder.
        zero: Whether 0 is a value as others are, rather than off.
        needs: What it needs to have an effect.
    """
    metadata = {
        "help": help,
        "flags": tuple(flags),
        "choices": choices if callable(choices) else tuple(choices),
        "range": _range(low, high, above, below),
        "length": length,
        "ascending": ascending,
        "path": path,
        "zero": zero,
        "needs": (needs,) if isinstance(needs, Need) else tuple(needs),
    }
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _range(low: float | None, high: float | None, above: float | None, below: float | None) -> tuple[Any, ...]:
    """As ``Number`` has it: the ends, and whether each is left out."""
    lowest, highest = low if above is None else above, high if below is None else below
    ends = -math.inf if lowest is None else lowest, math.inf if highest is None else highest
    return *ends, above is not None, below is not None


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: its name, its type taken apart, and what may be said about its value."""

    name: str
    kind: type  # int, float, str, bool, list or dict
    item: type  # of a list
    optional: bool
    default: Any
    metadata: Mapping[str, Any]
    group: str

    @property
    def flag(self) -> str:
        """The option as it is written on the command line."""
        return "--" + self.name.replace("_", "-")

    def off(self, value: Any) -> bool:
        """Whether a value switches something off: nothing, false, none, and 0 where that is not a value like others."""
        return not value and not (self.metadata["zero"] and isinstance(value, (int, float)))

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words; none means any."""
        named = self.metadata["choices"]
        return tuple(named() if callable(named) else named)

    @property
    def number(self) -> Number:
        """What its numbers may be; whole ones have 64 bits where nothing else is said."""
        low, high, above, below = self.metadata["range"]
        if self.item is int:
            low, high = max(low, -WHOLE), min(high, WHOLE - 1)
        return Number(int if self.item is int else float, low, high, above, below)

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.kind is dict:
            return "a mapping of names to plain values (key=value on the command line)"
        words = self.number.words if self.item in (int, float) else "text" if self.item is str else "true or false"
        if self.choices:
            words = "one of " + (
                ", ".join(c or "''" for c in self.choices)
                if len(self.choices) <= _MANY
                else f"{len(self.choices)} names"
            )
        if self.kind is list:
            low, high = self.metadata["length"] or (0, None)
            count = f"{low}" if low == high else f"{low} to {high}" if high else f"{low} or more"
            words = f"a list of {count}, each {words}" if low or high else f"a list, each {words}"
            words += " and none lower than the one before it" if self.metadata["ascending"] else ""
        return words + (", or none," if self.optional else "")


def options_of(schema: type) -> dict[str, Option]:
    """Every option of a dataclass made with `option`, by name."""
    hints = typing.get_type_hints(schema)
    groups = {name: cls for cls in reversed(schema.__mro__) for name in vars(cls).get("__annotations__", {})}
    found = {}
    for field in dataclasses.fields(schema):
        hint, optional = hints[field.name], False
        if typing.get_origin(hint) in (Union, types.UnionType):
            hint, optional = next(a for a in typing.get_args(hint) if a is not type(None)), True
        kind = typing.get_origin(hint) or hint
        item = typing.get_args(hint)[0] if kind is list else kind
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        group = (groups[field.name].__doc__ or "Options").strip().splitlines()[0]
        found[field.name] = Option(field.name, kind, item, optional, default, field.metadata, group)
    return found


def convert(option: Option, value: Any, where: str) -> Any:
    """Checks one value and gives it the option's type.

    Args:
        option: What it is for.
        value: From YAML, or text from the command line.
        where: How the option is called there, for the message.

    Returns:
        The value to store in the dataclass.

    Raises:
        UserError: The value is of another type, not among the choices, out of range, or names no possible file.
    """
    if option.optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    if option.optional and option.kind is str and value == "":
        return None
    try:
        if option.kind is dict:
            return _mapping(value)
        if option.kind is not list:
            return _scalar(option, value, option.kind, where)
        if not isinstance(value, (list, tuple)):
            raise ValueError
        values = [_scalar(option, v, option.item, where) for v in value]
        low, high = option.metadata["length"] or (0, None)
        falls = option.metadata["ascending"] and any(b < a for a, b in itertools.pairwise(values))
        if len(values) < low or (high is not None and len(values) > high) or falls:
            raise ValueError
        return values
    except (ValueError, OverflowError):
        hint = did_you_mean(value, option.choices) if isinstance(value, str) and option.choices else ""
        raise UserError(
            f"{where}: {shown(value)} was given where {option.expected} was expected{hint}; correct it."
        ) from None


def _scalar(option: Option, value: Any, kind: type[Any], where: str) -> Any:
    if kind in (int, float):
        value = option.number.read(value)  # texts are of the command line, and 1e-3, which YAML 1.1 reads as text
    elif type(value) is not kind:
        raise ValueError
    elif kind is str:
        value = _text(option, value, where)
    if option.metadata["choices"] and value not in option.choices:
        raise ValueError
    return value


def _text(option: Option, value: str, where: str) -> str:
    """Text without zero bytes; empty only where that is the default or a choice; a path that the system can look up."""
    if "\0" in value or (not value and option.default != "" and "" not in option.choices):
        raise ValueError
    value.encode("utf-8", "surrogateescape")  # YAML can name halves of characters, which no file and no terminal takes
    if not option.metadata["path"] or not value:
        return value
    value = os.path.expanduser(value)
    try:
        os.stat(value)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise UserError(
                f"{where}: {shown(value)} is a path that cannot be ({error.strerror}); correct it."
            ) from None
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        if not all(isinstance(v, str) and "=" in v[1:] for v in value):
            raise ValueError
        pairs = [v.partition("=") for v in value]
        if len({key for key, _, _ in pairs}) < len(pairs):
            raise ValueError
        value = {key: _literal(text) for key, _, text in pairs}
    if not isinstance(value, Mapping) or not _plain(value):
        raise ValueError
    return dict(value)


def _plain(value: Any) -> bool:
    """Whether a value can be written to YAML and to a checkpoint, and read again."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and "\0" not in key for key in value) and all(map(_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, str):
        return "\0" not in value
    if isinstance(value, int):
        return -WHOLE <= value < WHOLE
    return value is None or isinstance(value, float)


def _literal(text: str) -> Any:
    """The value of `key=value`: a Python literal, else `true`, `false`, `none`, else the text itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
