"""Sections that end badly, each in its way; the environment says whether they are to be good this time."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from revnets.gpu_report.registry import Column, Context, Registry, Row, Skipped
from revnets.gpu_report.results import ROWS

REPORT = Registry()
REPAIRED = "REVNETS_TEST_REPAIRED"
PIDS = "pids"


def add(letter: str, name: str, **more: Any) -> Callable[..., Any]:
    """A section of two rows."""
    return REPORT.section(
        letter,
        name,
        f"It {name}",
        **{"share": 50, **more},
        names=(Column("what", "what"),),
        figures=(Column("value", "value", "{:.1f}"), Column("note", "note")),
        plan=lambda tiny: [{"what": what, "command": f"measure {what}"} for what in ("one", "two")],
    )


def rows(context: Context, then: Callable[[], Any]) -> Iterator[Row]:
    """The first row, something, and the second; what is there is not measured again."""
    before = [row["what"] for row in context.before]
    if "one" not in before:
        yield {"what": "one", "value": 1}
    if REPAIRED not in os.environ:
        then()
    yield {"what": "two", "value": 2 + len(before)}


@add("a", "exits")
def exits(context: Context) -> Iterator[Row]:
    yield from rows(context, lambda: os._exit(7))


@add("b", "crashes")
def crashes(context: Context) -> Iterator[Row]:
    yield from rows(context, lambda: os.kill(os.getpid(), signal.SIGSEGV))


@add("c", "hangs", share=1)
def hangs(context: Context) -> Iterator[Row]:
    """With a child that would go on for long."""

    def hang() -> None:
        child = subprocess.Popen(["sleep", "600"])
        (context.output / PIDS).write_text(f"{os.getpid()} {child.pid}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    yield from rows(context, hang)


@add("d", "starves")
def starves(context: Context) -> Iterator[Row]:
    yield from rows(context, lambda: torch.empty(2**50))


@add("e", "babbles")
def babbles(context: Context) -> Iterator[Row]:
    """Rubbish on its output, half a row in the file, and killed as the kernel does where memory is short."""

    def babble() -> None:
        os.write(1, b'\xff\x00{"section": "e", "end": "done"}\n')
        with Path(context.output / ROWS).open("ab") as file:
            file.write(b'[1]\n{"section": "e", "row": {"what": "tw')
        os.kill(os.getpid(), signal.SIGKILL)

    yield from rows(context, babble)


@add("f", "refuses")
def refuses(context: Context) -> Iterator[Row]:
    raise Skipped("there is no abacus here")
    yield {}


@add("g", "works")
def works(context: Context) -> Iterator[Row]:
    yield from rows(context, lambda: None)
