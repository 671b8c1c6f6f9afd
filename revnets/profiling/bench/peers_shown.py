"""Peak against step time of all ways to train a network: a table, files and one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...training.files import write_csv
from ...training.pictures import caption, picture
from ..profile import describe
from ..report.tables import save_json
from ..target import Setting
from .peers import CHECKPOINTING, COMPILED, COMPILED_PLAN, OFFLOADED, PLAIN, PLANNED, Comparison, Row

OURS = (PLANNED, COMPILED_PLAN)
STYLES = {PLANNED: "o-", COMPILED_PLAN: "P:", PLAIN: "s", CHECKPOINTING: "^", COMPILED: "x--", OFFLOADED: "D"}
"""Of a way in a picture: those of several points are a curve."""
LABELS = {
    PLANNED: "plans, by budget",
    COMPILED_PLAN: "compiled plans, by budget",
    COMPILED: "torch.compile, by activation_memory_budget",
}


def ours_beside(row: Row, rows: Sequence[Row]) -> tuple[float | None, int | None]:
    """What our plans make of another way's figures, in the same run.

    Args:
        row: of the other way.
        rows: of the network.

    Returns:
        The shortest time, relative to plain's, of the plans with at most its peak, and the lowest peak of the plans
        with at most its time; None where there is no such plan.

    Example:
        >>> ours = [Row("m", PLANNED, 5, 5, 5, 3.0, 1.5), Row("m", PLANNED, 8, 8, 8, 2.2, 1.1)]
        >>> ours_beside(Row("m", CHECKPOINTING, None, None, 8, 2.6, 1.3), ours)
        (1.1, 8)
    """
    plans = [r for r in rows if r.way in OURS]
    times = [r.ratio for r in plans if r.measured_bytes <= row.measured_bytes]
    peaks = [r.measured_bytes for r in plans if r.seconds <= row.seconds]
    return min(times, default=None), min(peaks, default=None)


def print_comparison(found: Comparison, setting: Setting) -> None:
    """The table, and why ways are missing in it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found.target}: ways to train it, MB of 10^6 bytes ({describe(setting)})",
        caption="ours: the fastest plan with at most the peak of the row, and the lowest peak of the plans that "
        "take at most its time",
    )
    words = ("way", "which")
    numbers = ("budget", "planned peak", "measured peak", "off", "step, s", "x plain", "ours, x plain", "ours, peak")
    for column in (*words, *numbers):
        table.add_column(column, justify="left" if column in words else "right")
    for row in found.rows:
        off = "" if row.predicted_bytes is None else f"{100 * (row.measured_bytes / row.predicted_bytes - 1):+.2f}%"
        sizes = (_mb(row.budget_bytes), _mb(row.predicted_bytes), _mb(row.measured_bytes), off)
        time, peak = (None, None) if row.way in OURS else ours_beside(row, found.rows)
        beside = ("" if time is None else f"{time:.2f}", _mb(peak))
        table.add_row(row.way, row.choices, *sizes, f"{row.seconds:.3f}", f"{row.ratio:.2f}", *beside)
    console = Console(width=190)
    console.print(table)
    for way, why in found.skipped.items():
        console.print(f"{found.target}: {way} is skipped: {why}", markup=False, highlight=False, soft_wrap=True)


def save_table(found: Comparison, folder: Path) -> list[Path]:
    """The rows of a network as ``NAME.csv``, and their picture as ``NAME.png`` where matplotlib is installed."""
    name = found.target.title.replace(" ", "_")
    written = [write_csv(folder / f"{name}.csv", [asdict(row) for row in found.rows])]
    drawn = draw([found], folder / f"{name}.png")
    return written if drawn is None else [*written, drawn]


def save(comparisons: Sequence[Comparison], setting: Setting, path: Path) -> list[Path]:
    """The figures of several networks as JSON, and beside it one picture of all."""
    records = [
        {
            **found.target.columns(),
            "ways": [asdict(row) for row in found.rows],
            "skipped": found.skipped,
        }
        for found in comparisons
    ]
    written = [save_json(records, setting, path)]
    drawn = draw(comparisons, path.with_suffix(".png"))
    return written if drawn is None else [*written, drawn]


def draw(comparisons: Sequence[Comparison], path: Path) -> Path | None:
    """Measured peak against time of a step, a panel for each network."""
    columns = min(len(comparisons), 2)
    lines = math.ceil(len(comparisons) / columns)

    def paint(figure: Any) -> None:
        for place, found in enumerate(comparisons, 1):
            _paint(figure.add_subplot(lines, columns, place), found)

    return picture(path, (6.5 * columns, 4.5 * lines), paint)


def _paint(axes: Any, found: Comparison) -> None:
    for way in dict.fromkeys([*STYLES, *(row.way for row in found.rows)]):
        points = sorted((row.measured_bytes / 1e6, row.ratio) for row in found.rows if row.way == way)
        if points:
            size = 6 if way == PLANNED else 9
            axes.plot(*zip(*points, strict=True), STYLES.get(way, "*"), markersize=size, label=LABELS.get(way, way))
    axes.set(
        title=caption(str(found.target)),
        xlabel="measured peak of a training step, MB",
        ylabel="time of a step, x plain",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _mb(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:,.1f}"
