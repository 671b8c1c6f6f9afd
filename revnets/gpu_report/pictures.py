"""Pictures of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..training.pictures import picture
from .registry import Row
from .results import PICTURES, Report


def draw(report: Report, folder: Path) -> list[Path]:
    """One picture per section that has one and rows for it.

    Returns:
        the files.
    """

    def painted(figure: Any, paint: Callable[[Any, Sequence[Row]], None], rows: Sequence[Row]) -> None:
        paint(figure, rows)
        figure.suptitle(f"{report.machine or report.device}, {report.date}", fontsize=7)

    found = []
    for name, (letter, key, paint) in zip(PICTURES, _PICTURES, strict=True):
        rows = [row for row in report.outcomes[letter].rows if row.get(key)] if letter in report.outcomes else []
        if rows:
            found.append(picture(folder / name, (12, 6), partial(painted, paint=paint, rows=rows), dpi=130))
    return [path for path in found if path]


def _networks(figure: Any, rows: Sequence[Row]) -> None:
    """Time of a step and memory, per network and mode."""
    precision = rows[0]["precision"]
    shown = [row for row in rows if row["precision"] == precision]
    names = list(dict.fromkeys(f"{row['network']}:{row['batch']}" for row in shown))
    modes = list(dict.fromkeys(row["mode"] for row in shown))
    for axes, key, label in zip(
        figure.subplots(1, 2), ("step_ms", "allocated_mb"), ("step, ms", "allocated, MB"), strict=True
    ):
        for index, mode in enumerate(modes):
            bars = {f"{r['network']}:{r['batch']}": r[key] for r in shown if r["mode"] == mode and r.get(key)}
            heights = [bars.get(name, 0.0) for name in names]
            places = [n + index * 0.8 / len(modes) for n in range(len(names))]
            axes.barh(places, heights, height=0.8 / len(modes), label=mode)
        axes.set(title=f"{precision}, {label}", xlabel=label, yticks=range(len(names)), yticklabels=names)
        axes.legend(fontsize="small")


def _prediction(figure: Any, rows: Sequence[Row]) -> None:
    """Predicted memory over measured."""
    axes = figure.subplots()
    for key, what in (("allocated_mb", "allocated"), ("reserved_mb", "reserved")):
        points = [(row[key], row["predicted_mb"]) for row in rows if row.get(key)]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=what)
    highest = max(row["predicted_mb"] for row in rows)
    axes.plot([0, highest], [0, highest], color="black", linewidth=0.8)
    axes.set(title="Memory of a training step", xlabel="measured, MB", ylabel="predicted, MB")
    axes.legend()


def _fp8(figure: Any, rows: Sequence[Row]) -> None:
    """Speed-up over bfloat16 by width."""
    axes = figure.subplots()
    for kind, mode in dict.fromkeys((row["kind"], row["mode"]) for row in rows):
        points = sorted((row["width"], row["speedup"]) for row in rows if (row["kind"], row["mode"]) == (kind, mode))
        axes.plot(*zip(*points, strict=True), "o-", label=f"{kind}, {mode}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(title="FP8 over bfloat16, forward and backward", xlabel="width", ylabel="times faster", xscale="log")
    axes.legend()


_PICTURES: tuple[tuple[str, str, Callable[[Any, Sequence[Row]], None]], ...] = (
    ("c", "step_ms", _networks),
    ("d", "predicted_mb", _prediction),
    ("e", "speedup", _fp8),
)
"""Of which section, a figure that its rows need, and how it is drawn; names are in ``PICTURES``."""
