"""``revnets gpu-report``: from what was typed to the files."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..arguments import number, path, text
from ..training.errors import reason
from ..training.files import whole_file
from ..training.options.values import POSITIVE, check_choice
from ..training.places import check_folder
from . import runner, summary
from .pictures import draw
from .registry import CATALOG, Section, choose, load
from .results import FILES, LOG, REPORT, SUMMARY, Report, Store

DEVICES = ("cpu", "cuda")


def check_device(name: str) -> str:
    """The device, if it is here; empty for a GPU. Asks without using it: what this process takes, sections lack.

    Raises:
        ValueError: it is not here, or another one.
    """
    check_choice("device", name or "cuda", DEVICES)
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: --device cpu --tiny rehearses the report without one")
    return name or "cuda"


def run(
    output: Path,
    minutes: float = 8.0,
    sections: str = "",
    resume: bool = False,
    tiny: bool = False,
    device: str = "",
    say: Callable[[str], Any] = print,
    catalog: str = CATALOG,
) -> Report:
    """Measure, and write ``report.json``, ``summary.md`` and pictures.

    Args:
        output: folder, made if it is missing.
        minutes: for everything.
        sections: letters or names, separated by commas; all by default.
        resume: go on with the report in the folder: only what is missing or failed.
        tiny: small networks and few steps.
        device: ``"cpu"`` or ``"cuda"``, by default the latter.
        say: gets a sentence as each section ends.
        catalog: module of the sections.

    Returns:
        the report.

    Raises:
        ValueError: for what does not exist, and for a folder that holds another report.
    """
    POSITIVE.check("minutes", minutes)
    known = load(catalog)
    chosen = choose(sections, known)
    found = check_device(device)
    check_folder(output, FILES)
    store = Store(output)
    report = _begun(store, resume, found, tiny) or Report(found, tiny)
    output.mkdir(parents=True, exist_ok=True)
    try:
        runner.run_sections(runner.Request(output, chosen, found, minutes, tiny, catalog), report, say)
    finally:  # also where it was interrupted
        report = store.load() or report
        _finish(store, report, list(known.values()), say)
    return report


def _begun(store: Store, resume: bool, device: str, tiny: bool) -> Report | None:
    report = store.load()
    if report is None:
        return None
    if not resume:
        raise ValueError(f"{str(store.folder)!r} holds a report: --resume goes on with it, or give another folder")
    if (report.device, report.tiny) != (device, tiny):
        before = f"--device {report.device}{' --tiny' if report.tiny else ''}"
        raise ValueError(
            f"{str(store.folder)!r} holds a report of {before}: go on with the same, or give another folder"
        )
    return report


def _finish(store: Store, report: Report, sections: list[Section], say: Callable[[str], Any]) -> None:
    """Pictures, Markdown and tables of whatever there is; none of them is a reason to lose the others."""
    report.machine = _machine(report)
    store.save(report)
    wrote = [REPORT]
    for what, make in (
        ("pictures", lambda: [file.name for file in draw(report, store.folder)]),
        (SUMMARY, lambda: _write_summary(store, report, sections)),
        ("tables", lambda: summary.print_report(report, sections)),
    ):
        try:
            wrote += make() or []
        except Exception as error:
            with (store.folder / LOG).open("a") as log:
                traceback.print_exc(file=log)
            say(f"no {what}: {reason(error)}")
    say(f"wrote {', '.join(wrote)} in {store.folder}")


def _write_summary(store: Store, report: Report, sections: list[Section]) -> list[str]:
    with whole_file(store.folder / SUMMARY) as path:
        path.write_text(summary.markdown(report, sections, report.tiny), encoding="utf-8")
    return [SUMMARY]


def _machine(report: Report) -> str:
    """Card and versions, as section a found them."""
    from .sections.machine import machine_of

    outcome = report.outcomes.get("a")
    return machine_of(outcome.rows) if outcome is not None and outcome.rows else report.machine


def gpu_report_command(
    output: Annotated[Path, path("folder for report.json, summary.md, pictures and the log")],
    minutes: Annotated[float, number(POSITIVE, "for everything")] = 8.0,
    sections: Annotated[str | None, text("some of a (machine) to h (detector), separated by commas")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on: only what is missing or failed")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="small networks, few steps: a rehearsal")] = False,
    device: Annotated[str | None, text("cpu or cuda (default: cuda)")] = None,
) -> None:
    """Everything that only a GPU shows, section by section, each in a process of its own; see docs/gpu.md."""
    run(output, minutes, sections or "", resume, tiny, device or "", typer.echo)
