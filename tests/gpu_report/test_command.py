"""``revnets gpu-report``: a rehearsal of all sections without a GPU, its files, its mistakes, and docs/gpu.md."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import revnets
from revnets.cli import app
from revnets.gpu_report.registry import load
from revnets.gpu_report.results import DONE, FILES, SKIPPED, TABLE
from revnets.gpu_report.sections.tests import gpu_files
from revnets.layers.munit.break_even import KINDS, break_even

ROOT = Path(revnets.__file__).resolve().parents[1]
SECTIONS = load()
PNG = b"\x89PNG\r\n"


@pytest.mark.parametrize("letters", ["cef", pytest.param("abcdefgh", marks=pytest.mark.slow)])
def test_a_rehearsal(letters: str, tmp_path: Path) -> None:
    output = tmp_path / "report"
    line = ["gpu-report", "--output", str(output), "--tiny", "--device", "cpu", "--minutes", "60"]
    result = CliRunner().invoke(app, [*line, "--sections", ",".join(letters)])
    assert result.exit_code == 0, result.output
    outcomes = json.loads((output / "report.json").read_text())["outcomes"]
    assert list(outcomes) == list(letters)
    log = (output / "report.log").read_text(errors="replace")
    for letter, outcome in outcomes.items():
        skipped = outcome["state"] == SKIPPED and outcome["reason"]
        assert outcome["state"] == DONE or skipped, (letter, outcome, log[-5000:])
        assert f"{letter}  {SECTIONS[letter].name}: {outcome['state']} in " in result.output
    check_figures({letter: outcome["rows"] for letter, outcome in outcomes.items()})
    files = {path.name for path in output.iterdir()}
    assert {"report.json", "summary.md", "report.log", TABLE} <= files <= set(FILES)
    assert all(path.read_bytes().startswith(PNG) for path in output.glob("*.png"))
    assert set(break_even("cpu", output / TABLE).least) >= set(KINDS)


def check_figures(rows: dict[str, list[dict[str, Any]]]) -> None:
    """What a rehearsal on a CPU can know."""
    losses = {row["what"]: row["found"] for row in rows.get("a", []) if row["what"].startswith("test_revbifpn")}
    assert len({found for what, found in losses.items() if what.endswith("float32")}) <= 1
    by_mode = {row["mode"]: row for row in rows["c"] if row["network"].startswith("test_revbifpn")}
    assert by_mode["reversible"]["allocated_mb"] <= by_mode["store"]["allocated_mb"]  # or both that of the update
    assert all(row["step_ms"] > 0 and row["images_per_s"] > 0 for row in rows["c"])
    assert by_mode["reversible"]["largest_predicted"] > by_mode["store"]["largest_predicted"] > 0
    assert all(abs(row["error"]) < 0.05 for row in rows.get("d", []))
    assert all(row["non_finite"] == 0 for row in rows.get("g", []))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--output new --sections z", "unknown section 'z': expected some of a (machine), b (tests), c (networks)"),
        ("--output new --sections a,a", "'a' is there twice"),
        ("--output new --device abacus", "device='abacus': expected one of cpu, cuda"),
        ("--output new --device cuda", "there is no CUDA device here: --device cpu --tiny rehearses"),
        ("--output new", "there is no CUDA device here"),
        ("--output file --device cpu", "the output folder 'file' cannot be used"),
        ("--output new --minutes 0 --device cpu", "expected a number above 0"),
        ("--sections a --device cpu", "Missing option '--output'"),
    ],
)
def test_mistakes_are_one_sentence(line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("text")
    result = CliRunner().invoke(app, ["gpu-report", *line.split()])
    assert result.exit_code == 2
    assert result.stderr.startswith("revnets: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_page_has_every_row_with_its_command() -> None:
    """Once it holds measurements it still has them; ``summary.markdown(None, sections)`` has new ones."""
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").splitlines()
    for section in SECTIONS.values():
        assert f"## {section.letter}. {section.title}" in page
        assert all(any(line.startswith(f"| {target.words} | ") for line in page) for target in section.targets)
        for row in section.plan(False):
            names = "| " + " | ".join(section.identity(row)) + " | "
            (line,) = (line for line in page if line.startswith(names))
            assert without_batch(line).endswith(f"`{without_batch(row['command'])}` |")


def without_batch(command: str) -> str:
    """Batches are those that fit the card."""
    return re.sub(r"(@\d+):\d+", r"\1", command)


def test_commands_are_those_of_the_program() -> None:
    """Every command that rows name is understood, up to what needs a GPU."""
    import typer

    program: Any = typer.main.get_command(app)
    for section in SECTIONS.values():
        for row in section.plan(False):
            words = shlex.split(row["command"])
            if words[0] == "python":
                continue
            command = program.commands[words[1]]
            command.make_context(words[1], words[2:], resilient_parsing=False)


def test_plans_name_each_row_once() -> None:
    for section in SECTIONS.values():
        for tiny in (False, True):
            names = [section.identity(row) for row in section.plan(tiny)]
            assert len(set(names)) == len(names) > 0, section.letter


def test_the_files_with_tests_for_gpus() -> None:
    found = gpu_files(ROOT / "tests")
    assert {"tests/reversible/test_devices.py", "tests/layers/munit/test_fp8_triton.py"} <= set(found)
    assert "tests/reversible/test_modes.py" not in found
