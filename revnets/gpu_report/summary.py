"""What a report says: tables on the terminal, and the same as Markdown for ``docs/gpu.md``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .registry import Column, Row, Section
from .results import DONE, Report

_NOTE = 120  # letters of a note that tables show


def machine_line(report: Report) -> str:
    """Card, versions and date."""
    where = report.machine or f"device {report.device}"
    tiny = " TINY: these figures mean nothing, they show that everything runs." if report.tiny else ""
    return f"Measured on {report.date}: {where}.{tiny}"


# --- on the terminal -------------------------------------------------------------------------------------------------


def print_report(report: Report, sections: Sequence[Section]) -> None:
    """A table per section, then the promises, then how each section ended: what matters most comes last."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=180)
    for section in sections:
        outcome = report.outcomes.get(section.letter)
        if outcome is None or not outcome.rows:
            continue
        columns = _columns(section, outcome.rows)
        table = Table(title=f"{section.letter}. {section.title}")
        for column in columns:
            table.add_column(column.title)
        for row in outcome.rows:
            table.add_row(*(_cell(column.show(row)) for column in columns))
        console.print(table, markup=False)
    targets = Table(title="What was promised")
    for title in ("promise", "wanted", "measured", ""):
        targets.add_column(title)
    for words, wanted, value, verdict in promises(report, sections):
        targets.add_row(words, wanted, value, verdict)
    if targets.row_count:
        console.print(targets, markup=False)
    ended = Table(title=machine_line(report))
    for title in ("section", "ended", "s", "found", "because"):
        ended.add_column(title)
    for section in sections:
        outcome = report.outcomes.get(section.letter)
        if outcome is not None:
            cells = (outcome.state, f"{outcome.seconds:.0f}", outcome.words, outcome.reason)
            ended.add_row(f"{section.letter}  {section.name}", *map(_cell, cells))
    console.print(ended, markup=False)


def _columns(section: Section, rows: Sequence[Row]) -> list[Column]:
    """Those that have a value somewhere."""
    return [*section.names, *(c for c in section.figures if any(c.show(row) for row in rows))]


def _cell(text: str) -> str:
    return text if len(text) <= _NOTE else f"{text[: _NOTE - 3]}..."


def promises(report: Report, sections: Sequence[Section]) -> Iterator[tuple[str, str, str, str]]:
    """Every promise: words, limit, what was measured and whether it is kept; blank where that is not known."""
    for section in sections:
        outcome = report.outcomes.get(section.letter)
        for target in section.targets:
            value = target.value(outcome.rows) if outcome is not None else None
            if value is None:
                yield target.words, target.limit, "", ""
            else:
                verdict = "" if report.tiny else "kept" if target.met(value) else "NOT KEPT"
                yield target.words, target.limit, f"{value:.3g}", verdict


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(report: Report | None, sections: Sequence[Section], tiny: bool = False) -> str:
    """Everything as Markdown: every row that was planned, blank where it was not measured, with its command.

    Args:
        report: or None for blanks only.
        sections: all that there are, those that were not run included.
        tiny: whether the tiny rows were planned.

    Example:
        >>> from revnets.gpu_report.registry import choose, load
        >>> print(markdown(None, choose("f", load())).splitlines()[0])
        ## Promises
    """
    parts = [machine_line(report), ""] if report is not None else []
    parts += ["## Promises", "", *_promises(report, sections)]
    for section in sections:
        parts += ["", *_section(report, section, tiny)]
    return "\n".join(parts) + "\n"


def _promises(report: Report | None, sections: Sequence[Section]) -> Iterator[str]:
    yield from ("| promise | wanted | measured | |", "|---|---|---|---|")
    for cells in promises(report or Report("cuda", False), sections):
        yield _line(cells)


def _section(report: Report | None, section: Section, tiny: bool) -> Iterator[str]:
    outcome = report.outcomes.get(section.letter) if report is not None else None
    yield f"## {section.letter}. {section.title}"
    yield ""
    if outcome is not None and (outcome.state != DONE or outcome.words):
        yield f"{outcome.state}{': ' if outcome.words or outcome.reason else ''}" + "; ".join(
            text for text in (outcome.words, outcome.reason) if text
        )
        yield ""
    columns = (*section.names, *section.figures)
    titles = [*(column.title for column in columns), "command"]
    yield _line(titles)
    yield "|" + "---|" * len(titles)
    for row in section.complete(outcome.rows if outcome is not None else [], tiny):
        yield _line([*(column.show(row) for column in columns), f"`{row.get('command') or ''}`"])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"
