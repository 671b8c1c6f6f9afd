"""Runs sections one after the other, each in a process of its own with its own time limit."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import revnets

from ..training.termination import Terminated
from .registry import CATALOG, Section
from .results import DONE, FAILED, LOG, PARTLY, Outcome, Report, Store, outcome_of
from .worker import Work

_START = 120.0  # seconds that a process may take to import what it needs
_LEAST = 2.0  # seconds, with fewer left a section is not begun
_RESERVE = 0.03  # of the time: for the pictures


@dataclass(frozen=True)
class Request:
    """What to run.

    Args:
        output: folder of the report.
        sections: in order.
        device: ``"cpu"`` or ``"cuda"``.
        minutes: for all of them.
        tiny: small networks and few steps.
        catalog: module of the sections.
    """

    output: Path
    sections: Sequence[Section]
    device: str
    minutes: float = 8.0
    tiny: bool = False
    catalog: str = CATALOG


def run_sections(request: Request, report: Report, say: Callable[[str], Any] = print) -> Report:
    """Run what is not done yet, and take it up into the report, which is written as each section ends.

    A section that crashes, hangs or runs out of memory takes no other with it, and what it had measured is kept. Time
    that a section does not use is shared among those that follow.

    Args:
        request: what to run.
        report: of an earlier run, or an empty one; it is changed.
        say: gets a sentence as each section ends.

    Returns:
        the report.

    Raises:
        Terminated: SIGTERM came. What the section in progress had measured waits in a file for ``Store.load``.
    """
    store = Store(request.output)
    deadline = time.monotonic() + 60 * request.minutes * (1 - _RESERVE)
    todo = [s for s in request.sections if report.outcomes.get(s.letter, Outcome(FAILED)).state != DONE]
    with _terminable():
        store.save(report)
        store.begin()
        for index, section in enumerate(todo):
            left = deadline - time.monotonic()
            limit = left * section.share / sum(s.share for s in todo[index:])
            former = report.outcomes.get(section.letter)
            before = section.good(former.rows) if former is not None else []
            report.outcomes[section.letter] = outcome = _outcome(section, request, store, before, limit, deadline)
            store.save(report)
            store.begin()
            say(f"{section.letter}  {section.name}: {outcome}")
    store.end()
    return report


def _outcome(
    section: Section, request: Request, store: Store, before: list[dict[str, Any]], limit: float, deadline: float
) -> Outcome:
    if limit < _LEAST:
        reason = "no time was left: --resume does it, or more --minutes"
        return Outcome(PARTLY if before else FAILED, reason, 0.0, before, section.words(before) if before else "")
    start = time.monotonic()
    problem = _run(section, request, before, limit, deadline)
    rows, end = store.measured(section.letter)
    state, reason = end if end is not None and not problem else (FAILED, problem or "it ended without a word")
    seconds = time.monotonic() - start
    return outcome_of(section, [*before, *rows], state, reason, seconds, request.tiny)


def _run(section: Section, request: Request, before: list[dict[str, Any]], limit: float, deadline: float) -> str:
    """Run the process of a section; returns what went wrong with it, if anything did."""
    ready, started = os.pipe()
    work = Work(
        section.letter, request.device, request.tiny, limit, str(request.output.resolve()), before, started,
        request.catalog,
    )  # fmt: skip
    with (request.output / LOG).open("ab", buffering=0) as log, tempfile.TemporaryFile() as told:
        told.write(work.line().encode())
        told.seek(0)
        log.write(f"\n--- {section.letter}  {section.title}, {limit:.0f} s, {time.strftime('%H:%M:%S')}\n".encode())
        process = subprocess.Popen(
            [sys.executable, "-m", "revnets.gpu_report.worker"],
            stdin=told,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(started,),
            env=_environment(request.tiny and request.device == "cpu"),
        )
    os.close(started)
    try:
        until = min(_START, deadline - time.monotonic())
        if not select.select([ready], [], [], max(until, _LEAST))[0]:
            return f"it did not start within {until:.0f} s"
        code = process.wait(timeout=max(_LEAST, min(limit, deadline - time.monotonic())))
        return "" if code == 0 else f"its process died: {_died_of(code)}"
    except subprocess.TimeoutExpired:
        return f"it was stopped at its limit of {limit:.0f} s"
    finally:
        os.close(ready)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever it has started, too
        process.wait()


def _died_of(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name} (the machine may have run out of memory)" if name == "SIGKILL" else name


def _environment(one_thread: bool) -> dict[str, str]:
    """Processes import the library from where this one has it, and print at once."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} if one_thread else {}
    environment = {**threads, **os.environ, "PYTHONUNBUFFERED": "1"}
    root = Path(revnets.__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):
        former = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = str(root) + (os.pathsep + former if former else "")
    return environment


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the section's process, too; without this it would outlive us."""

    def end(number: int, frame: Any) -> None:
        raise Terminated("gpu-report was told to end; what was measured is written, --resume goes on")

    try:
        former = signal.signal(signal.SIGTERM, end)
    except ValueError:  # outside of the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
