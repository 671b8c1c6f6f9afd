"""The files of a report: rows as they are measured, and everything, whole, as each section ends."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..training.files import whole_file
from .registry import Row, Section

REPORT, ROWS, LOG, SUMMARY, TABLE = "report.json", "rows.jsonl", "report.log", "summary.md", "fp8_break_even.json"
PICTURES = ("networks.png", "prediction.png", "fp8.png")
FILES = (REPORT, ROWS, LOG, SUMMARY, TABLE, *PICTURES)
"""All there may be: no more than eight, since a lent machine gives no more back."""

DONE, PARTLY, SKIPPED, FAILED = "done", "partly", "skipped", "failed"
_LONGEST_LOG = 4 * 2**20


@dataclass
class Outcome:
    """How a section ended.

    Args:
        state: ``done``, ``partly`` (there are rows, others are missing or failed), ``skipped`` or ``failed``.
        reason: why it is not ``done``.
        seconds: that it took.
        rows: measured.
        words: about them.
    """

    state: str
    reason: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    words: str = ""

    def __str__(self) -> str:
        return f"{self.state} in {self.seconds:.0f} s" + "".join(
            f": {text}" for text in (self.words, self.reason) if text
        )


@dataclass
class Report:
    """All that is known.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        tiny: whether the figures mean nothing.
        date: of the first run.
        machine: card and versions, in words.
        outcomes: by the letters of their sections.
    """

    device: str
    tiny: bool
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    machine: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)


class Store:
    """The folder of a report.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows_path = folder / ROWS

    def load(self) -> Report | None:
        """What an earlier run left, rows of a section that never ended included; None where there is nothing.

        Raises:
            ValueError: the file is none of ours.
        """
        path = self.folder / REPORT
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            outcomes = {letter: Outcome(**outcome) for letter, outcome in data.pop("outcomes").items()}
            report = Report(**data, outcomes=outcomes)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise ValueError(f"{str(path)!r} is no report of gpu-report: give another folder, or delete it") from error
        for letter in {line["section"] for line in self._lines()}:
            rows, _ = self.measured(letter)
            if rows:
                outcome = report.outcomes.setdefault(letter, Outcome(FAILED))
                outcome.state, outcome.reason = PARTLY, "the run was interrupted"
                outcome.rows += rows
        return report

    def save(self, report: Report) -> None:
        """Write everything, whole."""
        with whole_file(self.folder / REPORT) as path:
            path.write_text(json.dumps(asdict(report), indent=1) + "\n")

    def begin(self) -> None:
        """No rows are waiting to be taken up into the report."""
        self.rows_path.write_bytes(b"")

    def end(self) -> None:
        """The rows are in the report, and the log is short enough to be carried."""
        self.rows_path.unlink(missing_ok=True)
        log = self.folder / LOG
        if log.is_file() and log.stat().st_size > _LONGEST_LOG:
            text = log.read_bytes()
            half = _LONGEST_LOG // 2
            log.write_bytes(text[:half] + b"\n[...]\n" + text[-half:])

    def measured(self, letter: str) -> tuple[list[Row], tuple[str, str] | None]:
        """The rows of a section that are waiting, and how it says that it ended (state and reason), if it does."""
        rows: list[Row] = []
        end = None
        for line in self._lines():
            if line["section"] == letter:
                if "row" in line:
                    rows.append(line["row"])
                else:
                    end = (line["end"], line["reason"])
        return rows, end

    def _lines(self) -> list[dict[str, Any]]:
        found = []
        if self.rows_path.is_file():
            for line in self.rows_path.read_bytes().split(b"\n"):
                try:
                    data = json.loads(line)
                except ValueError:  # the process was killed in the middle of it
                    continue
                if isinstance(data, dict) and "section" in data:
                    found.append(data)
        return found


class RowWriter:
    """Appends what a section measures, line by line, so that a process that dies loses nothing it has written.

    Args:
        path: of the rows.
        letter: of the section.
    """

    def __init__(self, path: Path, letter: str) -> None:
        self.path, self.letter = path, letter

    def row(self, row: Row) -> None:
        """One row."""
        self._write({"row": row})

    def end(self, state: str, reason: str = "") -> None:
        """The section has ended."""
        self._write({"end": state, "reason": reason})

    def _write(self, data: dict[str, Any]) -> None:
        line = json.dumps({"section": self.letter, **data}, default=str).encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, b"\n" + line + b"\n")  # the one before may have been cut short
            os.fsync(handle)
        finally:
            os.close(handle)


def outcome_of(section: Section, rows: Sequence[Row], state: str, reason: str, seconds: float, tiny: bool) -> Outcome:
    """How a section ended, from what it said and what it measured."""
    found = section.merged(rows)
    if state == DONE and (section.missing(found, tiny)):
        missing = section.missing(found, tiny)
        failed = sum(1 for row in found if row.get("failed"))
        state, reason = PARTLY, f"{len(missing)} of {len(section.plan(tiny))} rows are missing, {failed} failed"
    if state == FAILED and found:
        state = PARTLY
    return Outcome(state, reason, seconds, found, section.words(found) if found else "")
