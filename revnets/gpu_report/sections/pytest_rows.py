"""A plugin of pytest that writes how each test began and ended into a file, line by line.

The file is named by ``REVNETS_TEST_ROWS``. A run ends after a test that leaves CUDA unusable, since all later ones
would fail, too; whoever started it goes on with a new process.
"""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "REVNETS_TEST_ROWS"
_BROKEN = ("CUDA error", "device-side assert", "illegal memory access", "CUBLAS_STATUS_EXECUTION_FAILED")


def _write(**data: Any) -> None:
    with open(os.environ[VARIABLE], "a") as file:
        file.write(json.dumps(data) + "\n")


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """A test begins."""
    _write(test=nodeid, outcome="began")


def pytest_runtest_logreport(report: Any) -> None:
    """A phase of a test has ended; only what says something is written."""
    if report.when == "call" or report.outcome != "passed":
        text = "" if report.outcome == "passed" else _reason(report)
        _write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), reason=text)


def pytest_runtest_makereport(item: Any, call: Any) -> None:
    """Ends the run after a test that broke CUDA; the report itself is pytest's."""
    if call.excinfo is not None and any(words in str(call.excinfo.value) for words in _BROKEN):
        item.session.shouldstop = f"{item.nodeid} left CUDA unusable"


def _reason(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash is not None else report.longrepr).split())[:300]
