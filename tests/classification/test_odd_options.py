"""Random command lines and files: options or one sentence, never another exception, never a file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from classification import train
from classification.digits import DigitsOptions
from classification.options import TrainOptions, ValidateOptions
from classification.quickstart import QuickstartOptions
from revnets.training.errors import UserError
from revnets.training.options.parsing import Option, convert, options_of, parse

from .short_runs import SHORT

SCHEMAS = [TrainOptions, ValidateOptions, DigitsOptions, QuickstartOptions]
NUMBERS = ["0", "1", "-1", "2", "0.5", "1e-3", "-0.0", "1e308", "1e999", "nan", "inf", "-inf", "1_000", "0x10", "1,5"]
NUMBERS += ["\N{ARABIC-INDIC DIGIT THREE}", "9" * 5000, str(2**31), str(2**32), str(2**63), str(2**64), "1" + "0" * 400]
WORDS = [
    "",
    " ",
    "none",
    "None",
    "null",
    "true",
    "no",
    "~",
    "~nobody/x",
    "..",
    "/",
    "/dev/null",
    "a\0b",
    "x" * 5000,
    "a=b",
]
WORDS += [
    "\udc80",
    "\ud800",
    "\N{SNOWMAN}",
    "'",
    "{",
    "[1",
    "[[[[",
    "-",
    "--",
    "=",
    "=1",
    "a=",
    "a=1j",
    "a=(1,",
    "a={1:2}",
]
WORDS += [
    "auto",
    "cosine",
    "adamw",
    "adahessian",
    "bicubic",
    "mixup",
    "sparse_wide:0.75",
    "rand-m9",
    "hf-hub:a/b",
    "cuda",
]
TEXTS = st.sampled_from(NUMBERS + WORDS) | st.text(max_size=8)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([2**64, -(2**63), 10**400]) | TEXTS
TREES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


@st.composite
def lines(draw: st.DrawFn, schema: type) -> list[str]:
    """A command line of known options, of odd values, some of them of the right kind."""
    line: list[str] = []
    for each in draw(st.lists(st.sampled_from(list(options_of(schema).values())), max_size=6)):
        line.append(each.flag)
        if each.kind is not bool:
            line += draw(st.lists(TEXTS | _right(each), max_size=4 if each.kind in (list, dict) else 1))
    return line


def _right(each: Option) -> st.SearchStrategy[str]:
    """Values near what the option takes."""
    if each.choices:
        return st.sampled_from([*each.choices])
    ends = [end for end in each.metadata["range"][:2] if math.isfinite(end)]
    near = [f"{end + step}" for end in ends for step in (-1, 0, 1, 1e-9)] or NUMBERS
    return st.sampled_from([*near, str(each.default)])


def answered(schema: type, line: list[str]) -> Any:
    """The options, or None after a user's mistake in a sentence that can be read."""
    try:
        options = parse(schema, line, "", prog="odd")
        if hasattr(options, "check"):
            options.check()
    except UserError as error:
        return said(str(error))
    return options


def said(message: str) -> None:
    assert 10 < len(message) < 2500


def check_odd_line(schema: type, line: list[str]) -> None:
    options = answered(schema, line)
    for each in options_of(schema).values() if options is not None else ():
        value = getattr(options, each.name)
        numbers = value if isinstance(value, list) else [value]
        assert all(math.isfinite(number) for number in numbers if isinstance(number, (int, float))), each.name


def check_odd_file(schema: type, content: dict[str, Any], folder: Path) -> None:
    path = folder / "odd.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML, but for some of its texts
    answered(schema, ["--config", str(path)])
    path.unlink()


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which nothing may appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=500)  # of each of four schemas


def files(schema: type) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from([*options_of(schema), "base"]) | TEXTS, TREES, max_size=5)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
@pytest.mark.parametrize("effort", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"])
def test_odd_lines_and_files(schema: type, effort: settings, empty: Path) -> None:
    effort(given(lines(schema))(lambda line: check_odd_line(schema, line)))()
    effort(given(files(schema))(lambda content: check_odd_file(schema, content, empty)))()
    assert not os.listdir(empty)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_option_answers_every_odd_value(schema: type, empty: Path) -> None:
    for each in options_of(schema).values():
        for value in [*NUMBERS, *WORDS, True, None, 2**64, 10**400, math.nan, -1, 0.5, [], [[]], {}, {1: 2}, object()]:
            for content in (value, [value], [value] * 3):
                try:
                    convert(each, content, each.flag)
                except UserError as error:
                    said(str(error))
    assert not os.listdir(empty)


@pytest.mark.slow
def test_odd_trainings_end_in_a_run_or_a_sentence(digits: Path, empty: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole script on odd lines: code 0, or 2 with one sentence and no file."""

    def run(line: list[str]) -> None:
        output = empty / "output"
        huge = ("--img-size", "--input-size", "--workers", "--epochs", "--epoch-repeats", "--crop-pad", "--device")
        if any(flag in line for flag in huge):
            return  # they may cost minutes, or are of the machine
        whole = [*SHORT, *line, "--epochs", "1", "--data-dir", str(digits), "--output", str(output)]
        code = train.main([*whole, "--workers", "0", "--device", "cpu"])
        said = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
        assert code in (0, 2), line
        if code == 2:
            assert len(said) == 1, line
            assert not output.exists() or "updates in a row" in said[0], (line, said)
        for file in sorted(output.rglob("*"), reverse=True) if output.exists() else []:
            file.unlink() if file.is_file() else file.rmdir()
        if output.exists():
            output.rmdir()

    settings(LONG, max_examples=60)(given(lines(TrainOptions))(run))()
