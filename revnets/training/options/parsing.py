"""From a dataclass of options to checked values: defaults, then the YAML file and its bases, then the command line.

The dataclass is the only list of option names, types, ranges and help texts: the parser of the command line and the
checks of the YAML file are both made from it.

An option that has no effect is a mistake. An option names what it `needs`; where that is off, a value of its own that
somebody set is refused, be it on the command line or in a file, unless a file or line over it switched off what it
needs: a recipe with `mixup` and `mixup_prob` may be run with `--mixup 0`, and `mixup_prob` is then back at its default.
Values that switch something off (false, none, nothing, and 0 where that is not one value among others) are never
refused, nor are options about the machine rather than the training (loader processes, pinned memory, what only several
processes do): a recipe may move.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import UserError, did_you_mean, shown
from ..recipes import find
from .option import SEED, Need, Option, convert, option, options_of
from .yaml_files import load

__all__ = [
    "SEED",
    "Layer",
    "Need",
    "Option",
    "Parser",
    "argument",
    "check_values",
    "convert",
    "joined",
    "make_parser",
    "option",
    "options_of",
    "parse",
    "read_layers",
    "settled",
]
T = TypeVar("T")
EFFECT = "An option that has no effect is an error: what it needs is off, or another one wins over it."


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one file or the command line sets; `where` is the file, empty for the command line."""

    where: str
    values: dict[str, Any]
    asked: bool = True  # whether somebody asked for these values; those that a checkpoint brings may lack an effect


def _file_layers(path: Path, known: Mapping[str, Option], ignored: frozenset[str]) -> list[Layer]:
    """The base of all first."""
    layers = []
    for file, content in reversed(_with_bases(path)):
        checked = {}
        for key, value in content.items():
            if key in known:
                checked[key] = convert(known[key], value, f"{file}: {key}")
            elif key not in ignored:
                hint = did_you_mean(key, [*known, *ignored])
                raise UserError(f"{file}: unknown key {shown(key)}{hint}; `--help` lists all keys.")
        layers.append(Layer(str(file), checked))
    return layers


def _with_bases(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The file, its base, the base of that, and so on."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    next_path: Path | None = path
    while next_path is not None:
        content = load(next_path, f"{chain[-1][0]}: base" if chain else "--config")
        if next_path.resolve() in {file.resolve() for file, _ in chain}:
            raise UserError(f"{path}: base '{next_path}' leads back to itself; remove one `base:` line.")
        base = content.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise UserError(f"{next_path}: base: {shown(base)} was given where the name of a YAML file was expected.")
        chain.append((next_path, content))
        next_path = next_path.parent / base if base else None
    return chain


def _joined(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`; two mappings under one key are joined."""
    result = dict(low)
    for key, value in high.items():
        old = result.get(key)
        result[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return result


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are `UserError`s.

    Args:
        prog: What was typed before it; where it is not given, the script's name, or `python -m` and the module's, which
            argparse itself finds from Python 3.14 on.
        **how: Further arguments of argparse.
    """

    def __init__(self, prog: str | None = None, **how: Any) -> None:
        module = getattr(sys.modules["__main__"], "__spec__", None)
        super().__init__(prog or (f"python -m {module.name}" if module else None), allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists all options.")


def make_parser(schema: type, description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of a dataclass of options. Values stay text, absent options stay absent."""
    parser = Parser(prog, description=description, epilog=EFFECT, argument_default=argparse.SUPPRESS)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of options; the command line wins over it")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for each in options_of(schema).values():
        group = groups.setdefault(each.group, parser.add_argument_group(each.group))
        text = each.metadata["help"].replace("%", "%%")
        if each.kind is bool:
            positive = each.flag.replace("--no-", "--", 1)
            off = positive if each.name.startswith("no_") else "--no-" + each.flag[2:]
            group.add_argument(each.flag, dest=each.name, action="store_true", help=text)
            group.add_argument(off, dest=each.name, action="store_false", help=argparse.SUPPRESS)
            continue
        many: dict[str, Any] = {"nargs": "*"} if each.kind in (list, dict) else {}
        metavar = "KEY=VALUE" if each.kind is dict else each.item.__name__.upper()
        if each.metadata["choices"] and not callable(each.metadata["choices"]):
            metavar = "{" + ",".join(each.choices) + "}"
        if each.default not in (None, "", [], {}):
            text += f" (default: {each.default})".replace("%", "%%")
        group.add_argument(*each.metadata["flags"], each.flag, dest=each.name, metavar=metavar, help=text, **many)
    return parser


def parse(schema: type[T], argv: Sequence[str] | None, description: str, *, prog: str | None = None) -> T:
    """Reads the command line and the configuration file it names.

    Args:
        schema: The dataclass of options.
        argv: The arguments, `sys.argv[1:]` where None.
        description: First line of `--help`.
        prog: See `Parser`.

    Returns:
        An instance of `schema`.

    Raises:
        UserError: An unknown option or key, a value that does not fit, or one that has no effect.
    """
    return settled(schema, read_layers(schema, argv, description, prog=prog))


def read_layers(
    schema: type,
    argv: Sequence[str] | None,
    description: str,
    *,
    prog: str | None = None,
    ignored: frozenset[str] = frozenset(),
    ours: Path | None = None,
) -> list[Layer]:
    """Like `parse`, but only the values that the files and the command line set, the command line last.

    Args:
        schema: The dataclass of options.
        argv: The arguments, `sys.argv[1:]` where None.
        description: First line of `--help`.
        prog: See `Parser`.
        ignored: Keys of the YAML file that are known but not for this script.
        ours: Folder of files that `--config` finds by name.
    """
    known = options_of(schema)
    parser = make_parser(schema, description, prog)
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        hint = did_you_mean(rest[0].partition("=")[0], flags)
        if not rest[0].startswith("-") and "data_dir" in known:
            hint = f" (a data folder is given as --data-dir {rest[0][:200]})"
        raise UserError(f"unknown argument {shown(rest[0])}{hint}; `{parser.prog} --help` lists all options.")
    texts = vars(namespace)
    config = texts.pop("config", None)
    layers = []
    if config is not None:
        path = Path(os.path.expanduser(config)) if ours is None else find(config, ours, ".yaml", "--config")
        layers = _file_layers(path, known, ignored)
    from_line = {name: convert(known[name], value, known[name].flag) for name, value in texts.items()}
    return [*layers, Layer("", from_line)]


def joined(layers: Sequence[Layer]) -> dict[str, Any]:
    """The values of all layers, later ones over earlier ones."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = _joined(values, layer.values)
    return values


def settled(schema: type[T], layers: Sequence[Layer]) -> T:
    """The options that layers of values make, each of which has an effect or its default value.

    Args:
        schema: The dataclass of options.
        layers: From the lowest to the one that wins.

    Raises:
        UserError: A layer sets what has no effect there, nor with any layer over it.
    """
    known = options_of(schema)
    states: list[Any] = [schema(**joined(layers[: number + 1])) for number in range(len(layers))]
    for number, layer in enumerate(layers):
        for name, value in layer.values.items():
            if not layer.asked or known[name].off(value) or value == known[name].default:
                continue
            lacking = [_lacking(known[name], state) for state in states[number:]]
            need, called = lacking[-1], f"{layer.where}: {name}" if layer.where else known[name].flag
            if need is not None and all(lacking) and (need.in_files or not layer.where):
                raise UserError(
                    f"{called}: {shown(value)} has no effect, {need.lack.format(**vars(states[-1]))}; {need.fix}, or "
                    f"leave {known[name].flag} out."
                )
    idle = {
        name: known[name].default
        for name, value in joined(layers).items()
        if not known[name].off(value)
        and _lacking(known[name], states[-1]) is not None  # what is switched off stays off
    }
    return dataclasses.replace(states[-1], **idle)


def _lacking(option: Option, state: Any) -> Need | None:
    """What an option needs and does not have."""
    return next((need for need in option.metadata["needs"] if not need.holds(state)), None)


def check_values(options: Any) -> None:
    """Checks every value of an instance that was made in Python rather than read, as those that are read are.

    Args:
        options: Of a dataclass of options.

    Raises:
        UserError: A value does not fit its option.
    """
    for each in options_of(type(options)).values():
        convert(each, getattr(options, each.name), each.flag)


def argument(kind: type[T], **limits: Any) -> Callable[[str], T]:
    """The `type` of an argparse argument whose text is checked as that of an option is.

    Args:
        kind: int, float or str.
        **limits: As `option` takes them: `low`, `high`, `above`, `below`, `choices`, `path`.

    Example:
        >>> argument(int, low=0)("3")
        3
    """
    one = Option("", kind, kind, False, None, option(None, "", **limits).metadata, "")

    def read(text: str) -> T:
        try:
            value: T = convert(one, text, "")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ").removesuffix("; correct it.")) from None
        return value

    return read
