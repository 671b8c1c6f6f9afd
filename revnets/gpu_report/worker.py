"""Measures one section in this process: what it has measured is in a file before anything can go wrong.

python -m revnets.gpu_report.worker, with a ``Work`` as JSON on its standard input
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..training.errors import reason
from .registry import CATALOG, Context, Skipped, load
from .results import DONE, FAILED, ROWS, SKIPPED, RowWriter

_ORPHANED = 30  # seconds after its limit; by then whoever started this process is gone


@dataclass(frozen=True)
class Work:
    """What a process is started with.

    Args:
        letter: of the section.
        device: see ``Context``.
        tiny: likewise.
        seconds: likewise.
        output: the report's folder.
        before: good rows of an earlier run.
        ready: file descriptor to write to once everything is imported: from there on the time counts.
        catalog: module of the sections.
    """

    letter: str
    device: str
    tiny: bool
    seconds: float
    output: str
    before: list[dict[str, Any]]
    ready: int
    catalog: str = CATALOG

    def line(self) -> str:
        """As the process reads it."""
        return json.dumps(asdict(self), default=str)


def main() -> int:
    """Measures; the exit code says nothing, the last line of the rows does."""
    work = Work(**json.load(sys.stdin))
    faulthandler.enable()
    section = load(work.catalog)[work.letter]
    signal.alarm(round(work.seconds) + _ORPHANED)
    faulthandler.dump_traceback_later(max(0.1, 0.95 * work.seconds - 0.5))  # where it hangs, if it does
    os.write(work.ready, b".")
    os.close(work.ready)
    writer = RowWriter(Path(work.output) / ROWS, work.letter)
    context = Context(work.device, work.tiny, work.seconds, Path(work.output), work.before)
    commands = {section.identity(row): row.get("command") for row in section.plan(work.tiny)}
    try:
        for row in section.measure(context):
            writer.row({"command": commands.get(section.identity(row)), **row})
        writer.end(DONE)
    except Skipped as missing:
        writer.end(SKIPPED, str(missing))
    except BaseException as error:
        traceback.print_exc()
        writer.end(FAILED, _verdict(error))
    faulthandler.cancel_dump_traceback_later()
    return 0


def _verdict(error: BaseException) -> str:
    what = "ran out of memory" if out_of_memory(error) else type(error).__name__
    return f"{what}: {reason(error)}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory left, of the device or of the machine."""
    if isinstance(error, MemoryError):
        return True
    with contextlib.suppress(ImportError, AttributeError):
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


if __name__ == "__main__":
    sys.exit(main())
