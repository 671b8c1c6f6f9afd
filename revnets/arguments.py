"""How the ``revnets`` command reads what was typed: kinds of options, options without effect, a door for errors."""

from __future__ import annotations

import importlib
import math
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from .training.errors import USER_ERROR, UserError, one_line
from .training.files import NotWritten
from .training.options.values import Number

Function = TypeVar("Function", bound=Callable[..., Any])
Values = Mapping[str, Any]


# --- kinds of options ------------------------------------------------------------------------------------------------


def number(kind: Number, help: str) -> Any:
    """An option that is a number of this kind."""
    limits = "" if kind.low == -math.inf else f" {'>' if kind.above else '>='}{kind.low:g}"
    shown = f"<{kind.kind.__name__}{limits}>"
    return typer.Option(help=help, parser=_parser(kind.read), metavar=shown)


def path(help: str) -> Any:
    """An option that is a path."""
    return typer.Option(help=help, parser=_parser(_path), metavar="<path>")


def text(help: str, metavar: str | None = None) -> Any:
    """An option that is text, though not empty."""
    return typer.Option(help=help, parser=_parser(_text), metavar=metavar or "<str>")


def argument(help: str, metavar: str) -> Any:
    """An argument that is a name, or several."""
    return typer.Argument(help=help, parser=_parser(_text), metavar=metavar)


def _parser(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For typer, whose own message for a ``ValueError`` holds the value only."""

    def parse(value: Any) -> Any:
        try:
            return read(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    return parse


def _text(value: Any) -> str:
    if not value or "\0" in value or not value.strip():
        raise ValueError(f"{value!r}: expected some text, or leave it out")
    return str(value)


def _path(value: Any) -> Path:
    return Path(_text(str(value)))


# --- options without effect ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """An option that does nothing under a condition on all of them, and which others are to blame."""

    option: str
    idle: Callable[[Values], Any]
    why: str


def without_effect(option: str, why: str, idle: Callable[[Values], Any]) -> Callable[[Function], Function]:
    """Declare, above a command, that an option is a mistake under a condition: nobody types what does nothing.

    Args:
        option: by the name of its parameter.
        why: completes "--option has no effect ..."; may hold ``{values}`` of parameters.
        idle: of the values of all parameters; a rule counts only for options that were typed.
    """

    def declare(function: Function) -> Function:
        rules: list[Rule] = function.__dict__.setdefault("rules", [])
        rules.insert(0, Rule(option, idle, why))
        return function

    return declare


def needs(option: str, *others: str) -> Callable[[Function], Function]:
    """Declare that an option does nothing unless one of the others was given."""
    flags = " or ".join(map(_flag, others))
    return without_effect(option, f"without {flags}: add it", lambda v: not any(v[other] for other in others))


def excludes(option: str, *others: str) -> Callable[[Function], Function]:
    """Declare that an option does nothing once another one was given."""

    def declare(function: Function) -> Function:
        for other in reversed(others):
            idle = operator.itemgetter(other)
            function = without_effect(option, f"with {_flag(other)}: give one of them", idle)(function)
        return function

    return declare


def sized(names: Sequence[str | None], sign: str) -> bool:
    """Whether all these ``NAME@SIZE:BATCH`` have a size (``@``) or a batch (``:``) of their own."""
    return all(re.search(rf"{sign}\d[\dx]*(:\d+)?$", one) for one in names if one)


SIZED = "where every MODEL has its own: take it out of one"
PLAIN = "on networks without reversible parts: name one that has some"


def reversible(names: Sequence[str | None]) -> bool:
    """Whether some of the networks may have reversible parts: ours, and whatever a config or a sweep names."""
    return any(word in name for name in names if name for word in ("revbifpn", ".py", "families"))


class Command(TyperCommand):
    """A command that refuses options without effect, and those given twice; its mistakes end with one sentence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads what was typed."""
        typed = [word.partition("=")[0] for word in args[: args.index("--") if "--" in args else len(args)]]
        for option in self.params:
            flags = [*option.opts, *option.secondary_opts]
            if option.param_type_name == "option" and not getattr(option, "multiple", False):
                given = [word for word in typed if word in flags]
                if len(given) > 1:
                    raise typer.BadParameter(f"{' and '.join(given)} were given, where one counts", ctx=ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs it, once the options that were typed are known to count."""
        try:
            self._refuse_idle(ctx)
            return super().invoke(ctx)
        except _mistakes() as error:
            fail(error)

    def _refuse_idle(self, ctx: Any) -> None:
        for rule in getattr(self.callback, "rules", ()):
            source = ctx.get_parameter_source(rule.option)
            if source is None or source.name not in ("COMMANDLINE", "ENVIRONMENT"):
                continue
            if rule.idle(ctx.params):
                flag = _typed(rule.option, ctx.params[rule.option])
                fail(f"{flag} has no effect {rule.why.format_map(ctx.params)}, or leave {flag} out")


class Passing(TyperCommand):
    """A command that leaves what follows its name, ``--help`` and ``--`` included, and all mistakes to a script."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads nothing."""
        ctx.params[self.params[0].name] = list(args)
        return []


def passing(function: Function) -> Function:
    """Declare that a command's one argument, a list, is all that was typed after its name."""
    function.__dict__["command"] = Passing
    return function


class Later(Command):
    """A command of a table: its module is imported when it is called, or asked for its options.

    Args:
        name: of the command.
        where: ``module:function``, the module within this package.
        summary: one line of help, the first one of the function's docstring.
    """

    def __init__(self, name: str, where: str, summary: str) -> None:
        self._where = where
        self._real: Any = None
        super().__init__(name=name, help=summary)

    def real(self) -> Any:
        """The command itself."""
        if self._real is None:
            module, _, function = self._where.partition(":")
            found = getattr(importlib.import_module(f".{module}", __package__), function)
            alone = typer.Typer(add_completion=False)
            alone.command(self.name, cls=getattr(found, "command", Command))(found)
            self._real = typer.main.get_command(alone)
        return self._real

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Reads what was typed, as the command itself does."""
        return self.real().make_context(info_name, args, parent, **extra)

    @property
    def params(self) -> list[Any]:
        """Its options."""
        options: list[Any] = self.real().params
        return options

    @params.setter
    def params(self, nothing: Any) -> None: ...


def _typed(option: str, value: Any) -> str:
    return f"--no-{_flag(option)[2:]}" if value is False else _flag(option)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


# --- the door --------------------------------------------------------------------------------------------------------


class Commands(TyperGroup):
    """Commands whose mistakes end with one sentence and exit code 2; other exceptions are bugs, and show."""

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Reads the command line and runs what it says."""
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **more)
        try:
            code = run(*args, standalone_mode=False, **more)
        except typer.Abort:
            typer.echo("Aborted!", err=True)
            code = 1
        except Exception as error:  # of click, whose classes typer has changed more than once
            if not hasattr(error, "format_message"):
                raise
            _usage(error)
            code = USER_ERROR
        sys.exit(code if isinstance(code, int) else 0)


def _mistakes() -> tuple[type[Exception], ...]:
    kernels = sys.modules.get(f"{__package__}.kernels.build")  # where it was not imported, no kernel is missing
    return (ValueError, UserError, NotWritten, *([kernels.KernelUnavailable] if kernels is not None else []))


def _usage(error: Any) -> None:
    """What is wrong with a command line, or, where nothing was typed, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    program = getattr(getattr(error, "ctx", None), "command_path", "revnets")
    words = str(error.format_message()).rstrip(". ")
    _say(f"{words}{'' if words.endswith('?') else ';'} `{program} --help` lists what there is")


def fail(error: object) -> NoReturn:
    """Ends the command with one sentence."""
    _say(str(error))
    raise typer.Exit(USER_ERROR)


def _say(sentence: str) -> None:
    printable = one_line(ValueError(sentence)).encode(errors="backslashreplace").decode()
    typer.echo("revnets: " + printable.replace("\0", "\\0"), err=True)
