"""Section b: the tests that need a GPU, in a process of pytest's own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import revnets

from ..registry import REPORT, Column, Context, Row, Skipped, Target
from . import pytest_rows

ALL = "all of them"
ROOT = Path(revnets.__file__).resolve().parents[1]
COMMAND = "python -m pytest -m gpu tests"
_FOR_GPUS = re.compile(r"mark\.gpu\b|def test_\w+\([^)]*\bdevice\b")
_STARTS = 6  # a test that takes its process down is left out of the next
_TINY = "tests/reversible/test_devices.py"


def _plan(tiny: bool) -> list[Row]:
    return [{"test": ALL, "command": COMMAND}]


def _words(rows: Sequence[Row]) -> str:
    return next((str(row.get("outcome")) for row in rows if row["test"] == ALL), f"{len(rows)} tests, not all")


def _not_passed(rows: Sequence[Row]) -> float | None:
    return next((row.get("not_passed") for row in rows if row["test"] == ALL), None)


@REPORT.section(
    "b",
    "tests",
    "Tests that need a GPU",
    share=16,
    names=(Column("test", "test"),),
    figures=(Column("outcome", "outcome"), Column("seconds", "s", "{:.1f}"), Column("note", "note")),
    plan=_plan,
    targets=(Target("GPU tests that failed", _not_passed, most=0),),
    words=_words,
)
def measure(context: Context) -> Iterator[Row]:
    """Runs pytest, again and again where a test takes its process down."""
    if not (ROOT / "tests" / "helpers.py").is_file():
        raise Skipped(f"there is no folder of tests at {ROOT}: run it from a checkout")
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    files = [_TINY] if context.tiny else gpu_files(ROOT / "tests")
    outcomes: dict[str, str] = {}
    code = 0
    for _ in range(_STARTS):
        began: list[str] = []
        found = _pytest(files, list(outcomes), context, began)
        while True:
            try:
                row = next(found)
            except StopIteration as end:
                code = end.value
                break
            outcomes[row["test"]] = row["outcome"]
            yield row
        crashed = [test for test in began if test not in outcomes]
        for test in crashed:
            outcomes[test] = "crashed"
            yield {"test": test, "outcome": "crashed", "note": f"its process ended, code {code}", "command": _one(test)}
        if code in (0, 1, 5) or not began:  # all passed, some failed, none left
            break
    yield _total(outcomes, code)


def _total(outcomes: dict[str, str], code: int) -> Row:
    counts = Counter(outcomes.values())
    words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none was found"
    bad = counts["failed"] + counts["crashed"]
    note = None if code in (0, 1, 5) else f"pytest ended with code {code}, see report.log"
    row = {"test": ALL, "outcome": words, "note": note, "failed": bool(bad or note)}
    return {**row, "not_passed": bad} if bad or counts["passed"] else row


def gpu_files(tests: Path) -> list[str]:
    """The files with tests for GPUs, by mark or by the fixture ``device``; collecting all takes most of a minute."""
    found = [path for path in sorted(tests.rglob("test_*.py")) if _FOR_GPUS.search(path.read_text(encoding="utf-8"))]
    return [str(path.relative_to(tests.parent)) for path in found]


def _one(test: str) -> str:
    return f"python -m pytest '{test}'"


def _pytest(files: Sequence[str], done: Sequence[str], context: Context, began: list[str]) -> Generator[Row, None, int]:
    """Rows of the tests as they end; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        path.touch()
        line = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-rA",
            "-p",
            pytest_rows.__name__,
        ]
        line += ["-p", "no:cacheprovider", *files, *(f"--deselect={test}" for test in done)]
        environment = {**os.environ, pytest_rows.VARIABLE: str(path), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
        try:
            with path.open() as file:
                rest = ""
                while True:
                    ended = process.poll() is not None
                    *lines, rest = (rest + file.read()).split("\n")
                    for text in lines:
                        data = json.loads(text)
                        if data["outcome"] == "began":
                            began.append(data["test"])
                            continue
                        yield {
                            "test": data["test"],
                            "outcome": data["outcome"],
                            "seconds": data["seconds"],
                            "note": data["reason"] or None,
                            "failed": data["outcome"] == "failed",
                            "command": _one(data["test"]),
                        }
                    if ended:
                        return process.returncode
                    time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
