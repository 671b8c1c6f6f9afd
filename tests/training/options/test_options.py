# ruff: noqa: RUF009
"""One option: what values it takes, and when a value that has no effect is a mistake."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from revnets.training.errors import UserError, refused, shown
from revnets.training.options.option import option
from revnets.training.options.parsing import Layer, Need, argument, check_values, parse, settled

BLUR = Need(lambda options: options.blur, "--blur is {blur}", "add --blur 2")
LISTED = Need(lambda options: options.names, "there are no names", "add --names a", in_files=False)


@dataclasses.dataclass
class Recipe:
    """Recipe"""

    count: int = option(1, "a number", low=0, high=9)
    size: int = option(1, "a number without limits")
    share: float = option(0.5, "a share", above=0, below=1)
    span: list[float] = option([0.5, 1.0], "two numbers", above=0, length=(2, 2), ascending=True)
    colour: str = option("red", "a colour", choices=lambda: ("red", "green"))
    title: str = option("none yet", "some text")
    note: str | None = option(None, "some text or nothing")
    folder: str = option("", "a folder", path=True)
    more: dict[str, Any] = option({}, "anything else")
    names: list[str] = option([], "names")
    blur: int = option(0, "pixels", low=0)
    blur_shape: str = option("box", "of the blur", needs=BLUR)
    blur_share: float = option(0.5, "of the images", needs=BLUR)
    blur_steps: int | None = option(3, "of the blur", zero=True, needs=BLUR)
    order: str = option("up", "of the names", needs=LISTED)


def read(*line: str) -> Recipe:
    return parse(Recipe, line, "", prog="recipe")


@pytest.mark.parametrize(
    "line",
    [
        ["--count", "10"],
        ["--count", "-1"],
        ["--count", "1.0"],
        ["--count", "1_0"],
        ["--count", "\N{ARABIC-INDIC DIGIT THREE}"],
        ["--count", "true"],
        ["--count", "7" * 5000],
        ["--size", str(2**63)],
        ["--size", str(-(2**63) - 1)],
        ["--share", "0"],
        ["--share", "1"],
        ["--share", "nan"],
        ["--share", "\N{FULLWIDTH DIGIT ONE}e-3"],
        ["--span", "0.5"],
        ["--span", "1", "0.5"],
        ["--span", "0", "0"],
        ["--span", "0.1", "0.2", "0.3"],
        ["--colour", "blue"],
        ["--colour", ""],
        ["--title", ""],
        ["--title", "a\0b"],
        ["--folder", "a\0b"],
        ["--folder", "x" * 300],
        ["--folder", "x/" * 3000],
        ["--more", "a"],
        ["--more", "=1"],
        ["--more", "a=1", "a=2"],
        ["--more", "a=1j"],
        ["--more", "a=b'x'"],
        ["--more", f"a={2**70}"],
        ["--more", "a={1: 2}"],
    ],
    ids=lambda line: " ".join(line)[:40].replace("\0", "0"),
)
def test_values_that_do_not_fit_are_named(line: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read(*line)
    assert line[0] in str(caught.value)
    assert len(str(caught.value)) < 500


def test_values_at_the_limits_fit() -> None:
    got = read("--count", "9", "--size", str(-(2**63)), "--share", "1e-9", "--span", "2", "2", "--note", "", "--names")
    assert (got.count, got.size, got.share, got.span, got.note) == (9, -(2**63), 1e-9, [2, 2], None)


def test_links_that_lead_nowhere_and_loops(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert read("--folder", str(tmp_path / "nowhere")).folder == str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"--folder.*loop"):
        read("--folder", str(tmp_path / "loop"))


def test_home_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert read("--folder", "~/data").folder == "/somewhere/data"
    assert read("--title", "~/data").title == "~/data"


def test_choices_are_asked_for_late_and_the_closest_is_named() -> None:
    with pytest.raises(
        UserError, match=r"'gren' was given where one of red, green was expected \(did you mean 'green'"
    ):
        read("--colour", "gren")


@pytest.mark.parametrize("more", ["((" * 2000, "__import__('os')", "[1", "nan", "'", "1" * 5000])
def test_mappings_take_text_that_is_no_literal(more: str) -> None:
    assert read("--more", f"a={more}").more == {"a": more}


def test_values_made_in_python_are_checked_alike() -> None:
    check_values(Recipe())
    for values in ({"count": 10}, {"span": (1.0,)}, {"title": 3}, {"more": {"a": object()}}, {"count": True}):
        with pytest.raises(UserError, match="--" + next(iter(values))):
            check_values(dataclasses.replace(Recipe(), **values))


# --- effects ---------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return ["--config", str(path)]


def test_a_value_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--blur-share: 0\.25 has no effect, --blur is 0; add --blur 2, or leave --blur"
    ):
        read("--blur-share", "0.25")
    with pytest.raises(UserError, match=r"a.yaml: blur_share: 0.25 has no effect"):
        read(*write(tmp_path / "a.yaml", "blur_share: 0.25\n"))
    assert read("--blur-share", "0.25", "--blur", "1").blur_share == 0.25


def test_the_default_and_what_switches_off_are_never_refused() -> None:
    assert read("--blur-share", "0.5").blur_share == 0.5
    assert read("--blur-share", "0").blur_share == 0.0
    assert read("--blur-steps", "none").blur_steps is None


def test_a_zero_that_is_a_value_as_others_needs_an_effect(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--blur-steps: 0 has no effect, --blur is 0"):
        read("--blur-steps", "0")
    config = write(tmp_path / "a.yaml", "blur: 2\nblur_steps: 0\n")
    assert read(*config).blur_steps == 0
    assert read(*config, "--blur", "0").blur_steps == 3


def test_a_line_over_a_recipe_may_switch_off_what_its_options_need(tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", "blur: 3\nblur_share: 0.25\nblur_shape: disc\n")
    assert read(*config).blur_share == 0.25
    off = read(*config, "--blur", "0")
    assert (off.blur_share, off.blur_shape) == (0.5, "box")  # and nothing of it is left
    with pytest.raises(UserError, match="--blur-shape: 'star' has no effect"):
        read(*config, "--blur", "0", "--blur-shape", "star")


def test_a_base_may_set_what_a_file_over_it_switches_on(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "blur_share: 0.25\n")
    assert read(*write(tmp_path / "top.yaml", "base: base.yaml\nblur: 1\n")).blur_share == 0.25
    with pytest.raises(UserError, match=r"base.yaml: blur_share"):
        read(*write(tmp_path / "other.yaml", "base: base.yaml\ncount: 2\n"))


def test_some_needs_are_asked_of_the_command_line_alone(tmp_path: Path) -> None:
    assert read(*write(tmp_path / "a.yaml", "order: down\n")).order == "up"
    with pytest.raises(UserError, match="--order: 'down' has no effect, there are no names"):
        read("--order", "down")


def test_what_nobody_asked_for_may_lack_an_effect() -> None:
    assert settled(Recipe, [Layer("old.pth", {"blur_share": 0.25}, asked=False), Layer("", {})]).blur_share == 0.5


@pytest.mark.parametrize(
    ("spec", "words"),
    [(ModuleSpec("some.script", None), "usage: python -m some.script "), (None, "usage: script.py ")],
    ids=["as a module", "by its path"],
)
def test_usage_is_as_it_was_typed(
    spec: ModuleSpec | None, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", ["/some/script.py"])
    with pytest.raises(SystemExit):
        parse(Recipe, ["--help"], "")
    assert capsys.readouterr().out.startswith(words)
    with pytest.raises(SystemExit):
        parse(Recipe, ["--help"], "", prog="revnets some")
    assert capsys.readouterr().out.startswith("usage: revnets some ")


# --- helpers ---------------------------------------------------------------------------------------------------------


def test_arguments_of_argparse_are_checked_as_options_are() -> None:
    read = argument(int, low=0, high=9)
    assert read("9") == 9
    for text in ("10", "-1", "x", "1_0", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="a whole number of at least 0 and at most 9"):
            read(text)
    with pytest.raises(argparse.ArgumentTypeError, match="too long"):
        argument(str, path=True)("x" * 300)


def test_refusals_wrap_others_errors_and_pass_ours() -> None:
    with pytest.raises(UserError, match=r"--opt: no \(a b\); correct it\."), refused("--opt: no", "correct it"):
        raise RuntimeError("a\n  b.")
    with pytest.raises(UserError, match=r"^ours$"), refused("--opt: no", "correct it"):
        raise UserError("ours")
    with pytest.raises(KeyboardInterrupt), refused("--opt: no", "correct it"):
        raise KeyboardInterrupt


def test_values_are_shown_short() -> None:
    bomb: list[Any] = ["x"]
    for _ in range(50):
        bomb = [bomb] * 9
    assert all(len(shown(value)) < 3000 for value in (bomb, "x" * 10**6, 10**6000, {"a": bomb}))
