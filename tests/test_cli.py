"""The table of commands: each is there, says what its function says, and is imported when it is called."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
import typer
from typer.testing import CliRunner

from revnets import __version__
from revnets.cli import COMMANDS, app

HEAVY = ("mmdet", "matplotlib", "revnets.deploy", "revnets.profiling", "revnets.gpu_report", "revnets.scripts.command")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("line", [[], ["--help"], ["no-such-command"]])
def test_help_and_mistakes_import_no_command(line: list[str]) -> None:
    code = (
        "import contextlib, sys\n"
        "from revnets.cli import app\n"
        f"with contextlib.suppress(SystemExit): app({line!r})\n"
        f"print('heavy:', *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    assert python(code).splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize("name", COMMANDS)
def test_rows_say_what_functions_say(name: str) -> None:
    module, _, function = COMMANDS[name][0].partition(":")
    found = getattr(import_module(f"revnets.{module}"), function)
    assert found.__doc__.splitlines()[0] == COMMANDS[name][1]
    assert function.removesuffix("_command") == name.replace("-", "_").replace("2to4", "two_to_four")


def test_help_lists_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).stdout
    words = shown.split()
    assert all(name in words for name in COMMANDS)


def test_a_command_is_read_once_and_by_itself() -> None:
    code = (
        "import sys, typer\n"
        "from revnets.cli import app\n"
        "command = typer.main.get_command(app).commands['layers']\n"
        "assert 'revnets.profiling.layers_command' not in sys.modules\n"
        "assert [option.name for option in command.params] == ['model', 'spec', 'img_size', 'output']\n"
        "assert command.real() is command.real()\n"
        "assert 'revnets.profiling.layers_command' in sys.modules\n"
        "assert 'revnets.deploy.command' not in sys.modules\n"
    )
    python(code)


def test_a_close_name_is_offered() -> None:
    result = CliRunner().invoke(app, ["profil"])
    assert result.exit_code == 2
    assert result.stderr.startswith("revnets: ")
    assert "'profile'? `" in result.stderr


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"revnets {__version__}, torch ")


def test_the_group_is_one_of_typer() -> None:
    group = typer.main.get_command(app)
    assert list(group.commands) == list(COMMANDS)  # type: ignore[attr-defined]
