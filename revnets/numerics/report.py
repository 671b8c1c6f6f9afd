"""Records of a ``NumericsMonitor`` as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.files import write_csv
from ..training.pictures import caption, picture

Record = dict[str, Any]
FILES = TABLE, PICTURE = "numerics.csv", "numerics.png"
_COLORS = {"input": "C0", "weight": "C1", "output": "C2", "output_grad": "C3", "weight_grad": "C4"}


def print_table(records: Sequence[Record], title: str) -> None:
    """The last watched step on the terminal, layer by layer, with the means of all FP8 layers."""
    from rich.console import Console
    from rich.table import Table

    last = [r for r in records if r["step"] == records[-1]["step"]]
    caption = "RMS; 0: share flushed to zero, ∞: share clipped, in a cast to e4m3 (input, weight) or e5m2 (gradient)"
    table = Table(title=title, caption=caption)
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    table.add_column("FP8")
    for words in ("input", "0", "∞", "weight", "0", "∞", "output", "output grad", "0", "∞", "weight grad"):
        table.add_column(words, justify="right")
    for r in last:
        table.add_row(
            r["layer"],
            r["kind"],
            "yes" if r["fp8"] else "no",
            *(_size(r["input_rms"]), _share(r["input_flushed"]), _share(r["input_clipped"])),
            *(_size(r["weight_rms"]), _share(r["weight_flushed"]), _share(r["weight_clipped"])),
            _size(r["output_rms"]),
            *(_size(r["output_grad_rms"]), _share(r["output_grad_flushed"]), _share(r["output_grad_clipped"])),
            _size(r["weight_grad_rms"]),
        )
    console = Console(width=180)
    console.print(table)
    console.print(summary(last), markup=False, highlight=False)


def summary(records: Sequence[Record]) -> str:
    """One sentence: the mean shares over the FP8 layers, or over all where none is in FP8, and the worst layer."""
    chosen = [r for r in records if r["fp8"]] or list(records)
    who = f"{len(chosen)} FP8 layers" if chosen[0]["fp8"] else f"{len(chosen)} layers, none of them in FP8"
    words = []
    for what in ("input", "weight", "output_grad"):
        for loss in ("flushed", "clipped"):
            found = [(r[f"{what}_{loss}"], r["layer"]) for r in chosen if r[f"{what}_{loss}"] is not None]
            if found:
                mean, (worst, layer) = sum(share for share, _ in found) / len(found), max(found)
                most = f" (most in {layer}: {_share(worst)})" if worst else ""
                words.append(f"{what.replace('_', ' ')} {loss} {_share(mean)}{most}")
    return f"mean over {who}: " + "; ".join(words)


def _size(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}" if not 0.01 <= value < 1000 else f"{value:.3f}"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else "<0.01%" if value < 1e-4 else f"{value:.2%}"


def write_table(records: Sequence[Record], folder: Path) -> Path:
    """All records as ``numerics.csv``, complete or not at all."""
    return write_csv(folder / TABLE, records)


def read_table(folder: Path) -> list[Record]:
    """The records of ``numerics.csv``; none where there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    path = folder / TABLE
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            records = [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]
        if any(not isinstance(record.get("step"), int) or record.get("layer") is None for record in records):
            raise ValueError("a row without step or layer")
    except (ValueError, TypeError, csv.Error, OSError) as error:
        raise ValueError(f"{str(path)!r} is no table of numerics ({error}): delete it") from error
    return records


def _value(key: str, text: str) -> Any:
    if key in ("layer", "kind"):
        return text
    if key == "fp8":
        return text == "True"
    return None if not text else int(text) if key == "step" else float(text)


def draw_picture(records: Sequence[Record], folder: Path, title: str) -> Path | None:
    """``numerics.png``: sizes, shares flushed and shares clipped over the layers; crosses are the first watched step.

    Returns:
        The file; None where matplotlib is not installed.
    """
    return picture(folder / PICTURE, (12, 10), lambda figure: _paint(figure, records, title))


def _paint(figure: Any, records: Sequence[Record], title: str) -> None:
    steps = sorted({r["step"] for r in records})
    axes = figure.subplots(3, 1, sharex=True)
    for step, marker in {steps[0]: "x", steps[-1]: "."}.items():
        chosen = [r for r in records if r["step"] == step]
        for what, color in _COLORS.items():
            look = {"color": color, "linestyle": "", "marker": marker, "markersize": 4}
            label = f"{what.replace('_', ' ')}, step {step}"
            axes[0].plot(_column(chosen, f"{what}_rms"), label=label, **look)
            for panel, loss in ((axes[1], "flushed"), (axes[2], "clipped")):
                if f"{what}_{loss}" in chosen[0]:
                    panel.plot([100 * v for v in _column(chosen, f"{what}_{loss}")], label=label, **look)
    axes[0].set_title(caption(textwrap.fill(title, 120)), fontsize="medium")
    axes[0].set(ylabel="RMS", yscale="log")
    axes[0].axhspan(0.5, 2, color="gray", alpha=0.15, linewidth=0)
    axes[1].set(ylabel="flushed to zero, %")
    axes[2].set(ylabel="clipped, %", xlabel="layer, in the order of the model")
    for panel in axes[1:]:
        panel.set_yscale("symlog", linthresh=0.01)
        panel.set_ylim(0, 110)
    names = [r["layer"] for r in records if r["step"] == steps[-1]]
    every = -(-len(names) // 60)
    axes[2].set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=6)
    for panel in axes:
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize="small", ncols=2)


def _column(records: Sequence[Record], key: str) -> list[float]:
    return [float("nan") if r[key] is None else r[key] for r in records]
