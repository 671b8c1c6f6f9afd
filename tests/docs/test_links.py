"""Links lead to files that are there, and commands are ones that can be typed."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from revnets.cli import app

from .pages import NAMES, PAGES, ROOT, anchors, commands, links

every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


@every_page
def test_links(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{link}: there is no such heading"


@every_page
def test_paths_that_are_named(page: Path) -> None:
    for words in commands(page):
        for word in words:
            path = re.split(r"[@:]", word)[0]
            if re.fullmatch(r"(tests|configs|docs|examples|classification|detection|revnets)/[\w./-]+", path):
                assert (ROOT / path).exists() or "NAME" in path, f"there is no {path}"


@every_page
def test_commands_of_revnets(page: Path) -> None:
    group = typer.main.get_command(app)
    for words in commands(page):
        if words[0] == "revnets" and words[1:] and not words[1].startswith("-"):
            known = group.commands  # type: ignore[attr-defined]
            assert words[1] in known, f"there is no `{' '.join(words[:2])}`"
            if words[2:]:
                _read(known[words[1]], words)


def _read(command: typer.core.TyperCommand, words: list[str]) -> None:
    """Has the command read a line; what is missing in a line that a sentence quotes does not count."""
    refusal = ""
    try:
        command.make_context(words[1], [word for word in words[2:] if word != "..."])
    except Exception as error:  # of click, whose classes typer has changed more than once
        if not hasattr(error, "format_message"):
            raise
        refusal = error.format_message()
    unsaid = "Missing" in refusal or "requires an argument" in refusal
    assert not refusal or unsaid, f"`{' '.join(words)}`: {refusal}"


@every_page
def test_options_of_scripts(page: Path) -> None:
    for words in commands(page):
        known = _options(words)
        for flag in (word.partition("=")[0] for word in words if word.startswith("--") and known is not None):
            assert flag in (known or ()), f"`{' '.join(words)}`: there is no {flag}"


def _options(words: list[str]) -> set[str] | None:
    """The options of the script that a line runs; None where it runs none of ours."""
    program = words[1] if words[0] in ("python", "python3", "revnets") and words[1:] else words[0]
    name = {"train": "classification/train.py", "validate": "classification/validate.py"}.get(program, program)
    return SCRIPTS[name]() if name in SCRIPTS else None


def _classification(options: str) -> set[str]:
    from classification import options as module

    names = [field.name for field in fields(getattr(module, options))]
    return (
        {f"--{name.replace('_', '-')}" for name in names}
        | {f"--no-{name.replace('_', '-')}" for name in names}
        | {"--config"}
    )


def _detection() -> set[str]:
    pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    from detection import train

    return {flag for action in train.options()._actions for flag in action.option_strings}


SCRIPTS: dict[str, Callable[[], set[str]]] = {
    "classification/train.py": lambda: _classification("TrainOptions"),
    "train.py": lambda: _classification("TrainOptions"),
    "classification/validate.py": lambda: _classification("ValidateOptions"),
    "validate.py": lambda: _classification("ValidateOptions"),
    "detection/train.py": _detection,
    "detect": _detection,
}


@every_page
def test_modules_that_are_run(page: Path) -> None:
    for words in commands(page):
        if words[0] in ("python", "python3") and words[1:2] == ["-m"] and words[2].partition(".")[0] in OURS:
            assert importlib.util.find_spec(words[2]) is not None, f"there is no module {words[2]}"


OURS = ("revnets", "classification", "detection", "tests")


@every_page
def test_targets_of_make(page: Path) -> None:
    targets = re.findall(r"(?m)^([a-z][\w-]*):", (ROOT / "Makefile").read_text())
    for words in commands(page):
        if words[0] == "make" and words[1:]:
            assert words[1] in targets or "=" in words[1], f"there is no `make {words[1]}`"
