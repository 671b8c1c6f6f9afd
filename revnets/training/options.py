"""From a dataclass of options to checked values: defaults, then the YAML file and its bases, then the command line.

The dataclass is the only list of option names, types, ranges and help texts: the parser of the command line and the
checks of the YAML file are both made from it.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union

import yaml

from .errors import UserError, did_you_mean, one_line

T = TypeVar("T")
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def option(
    default: Any,
    help: str,
    *,
    flags: Sequence[str] = (),
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that is also an option of the command line and a key of the YAML file.

    Args:
        default: Its value where nobody sets it.
        help: One line for `--help`.
        flags: Further spellings on the command line, such as `-b`.
        choices: The allowed words; none means any.
        low: The lowest allowed number.
        high: The highest allowed number.
    """
    metadata = {"help": help, "flags": tuple(flags), "choices": tuple(choices), "low": low, "high": high}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


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

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.kind is dict:
            return "a mapping of names to values (key=value on the command line)"
        words = f"a list, each {_NAMES[self.item]}" if self.kind is list else _NAMES[self.kind]
        low, high = self.metadata["low"], self.metadata["high"]
        if low is not None or high is not None:
            words += f" of at least {low:g}" if low is not None else ""
            words += f" and at most {high:g}" if high is not None else ""
        if self.metadata["choices"]:
            words = "one of " + ", ".join(self.metadata["choices"])
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
        UserError: The value is of another type, not among the choices, or out of range.
    """
    if option.optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    try:
        if option.kind is dict:
            return _mapping(value)
        if option.kind is list:
            if not isinstance(value, (list, tuple)):
                raise ValueError
            return [_scalar(option, v, option.item) for v in value]
        return _scalar(option, value, option.kind)
    except ValueError:
        raise UserError(f"{where}: {value!r} was given where {option.expected} was expected; correct it.") from None


def _scalar(option: Option, value: Any, kind: type[Any]) -> Any:
    if kind is float and isinstance(value, str):
        value = float(value)  # text of the command line, and 1e-3, which YAML 1.1 reads as text
    if kind is int and isinstance(value, str):
        value = int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError
    low, high, choices = (option.metadata[key] for key in ("low", "high", "choices"))
    if (low is not None and value < low) or (high is not None and value > high) or (choices and value not in choices):
        raise ValueError
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    if not isinstance(value, list) or not all(isinstance(v, str) and v.partition("=")[1] for v in value):
        raise ValueError
    return {key: _literal(text) for key, _, text in (v.partition("=") for v in value)}


def _literal(text: str) -> Any:
    """The value of `key=value`: a Python literal, else `true`, `false`, `none`, else the text itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_yaml(path: Path, known: Mapping[str, Option], ignored: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Reads a configuration and the ones it builds on.

    A key `base: other.yaml` names the file to start from, relative to the file that says so. Mappings such as
    `model_kwargs` are joined key by key, all else is replaced.

    Args:
        path: The YAML file.
        known: The options it may set.
        ignored: Further keys that other scripts read.

    Returns:
        The checked values.

    Raises:
        UserError: No such file, not YAML, an unknown key, or a value that does not fit.
    """
    values: dict[str, Any] = {}
    for file, content in reversed(_with_bases(path)):
        checked = {}
        for key, value in content.items():
            if key in known:
                checked[key] = convert(known[key], value, f"{file}: {key}")
            elif key not in ignored:
                names = [*known, *ignored]
                raise UserError(f"{file}: unknown key '{key}'{did_you_mean(str(key), names)}; `--help` lists all keys.")
        values = _joined(values, checked)
    return values


def _with_bases(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The file, its base, the base of that, and so on."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    next_path: Path | None = path
    while next_path is not None:
        if next_path.resolve() in {file.resolve() for file, _ in chain}:
            raise UserError(f"{path}: base '{next_path}' leads back to itself; remove one `base:` line.")
        content = _load(next_path, named_by=chain[-1][0] if chain else None)
        base = content.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise UserError(f"{next_path}: base: {base!r} was given where the name of a YAML file was expected.")
        chain.append((next_path, content))
        next_path = next_path.parent / base if base else None
    return chain


def _load(path: Path, named_by: Path | None) -> dict[str, Any]:
    origin = f"{named_by}: base" if named_by else "--config"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{origin}: '{path}' cannot be read ({error.strerror}); give an existing YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{origin}: '{path}' is not valid YAML ({one_line(error)}); correct it.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{origin}: '{path}' holds {type(content).__name__} where `key: value` lines were expected.")
    return content


def _joined(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`; two mappings under one key are joined."""
    result = dict(low)
    for key, value in high.items():
        old = result.get(key)
        result[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return result


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists all options.")


def make_parser(schema: type, description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of a dataclass of options. Values stay text, absent options stay absent."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of options; the command line wins over it")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options_of(schema).values():
        group = groups.setdefault(option.group, parser.add_argument_group(option.group))
        text = option.metadata["help"].replace("%", "%%")
        if option.kind is bool:
            positive = option.flag.replace("--no-", "--", 1)
            off = positive if option.name.startswith("no_") else "--no-" + option.flag[2:]
            group.add_argument(option.flag, dest=option.name, action="store_true", help=text)
            group.add_argument(off, dest=option.name, action="store_false", help=argparse.SUPPRESS)
            continue
        many: dict[str, Any] = {"nargs": "*"} if option.kind in (list, dict) else {}
        metavar = "KEY=VALUE" if option.kind is dict else option.item.__name__.upper()
        if option.metadata["choices"]:
            metavar = "{" + ",".join(option.metadata["choices"]) + "}"
        if option.default not in (None, "", [], {}):
            text += f" (default: {option.default})".replace("%", "%%")
        group.add_argument(*option.metadata["flags"], option.flag, dest=option.name, metavar=metavar, help=text, **many)
    return parser


def parse(
    schema: type[T],
    argv: Sequence[str] | None,
    description: str,
    *,
    prog: str | None = None,
    ignored: frozenset[str] = frozenset(),
    under: Mapping[str, Any] | None = None,
) -> T:
    """Reads the command line and the configuration file it names.

    Args:
        schema: The dataclass of options.
        argv: The arguments, `sys.argv[1:]` where None.
        description: First line of `--help`.
        prog: Name of the script in messages.
        ignored: Keys of the YAML file that are known but not for this script.
        under: Values that win over the defaults only.

    Returns:
        An instance of `schema`.

    Raises:
        UserError: An unknown option or key, or a value that does not fit.
    """
    values = {**(under or {}), **given(schema, argv, description, prog=prog, ignored=ignored)}
    return schema(**values)


def given(
    schema: type,
    argv: Sequence[str] | None,
    description: str,
    *,
    prog: str | None = None,
    ignored: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Like `parse`, but only the values that the file or the command line set."""
    known = options_of(schema)
    parser = make_parser(schema, description, prog)
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        hint = did_you_mean(rest[0].partition("=")[0], flags)
        if not rest[0].startswith("-") and "data_dir" in known:
            hint = f" (a data folder is given as --data-dir {rest[0]})"
        raise UserError(f"unknown argument '{rest[0]}'{hint}; `{parser.prog} --help` lists all options.")
    texts = vars(namespace)
    config = texts.pop("config", None)
    from_file = read_yaml(Path(config), known, ignored) if config else {}
    from_line = {name: convert(known[name], value, known[name].flag) for name, value in texts.items()}
    return _joined(from_file, from_line)
