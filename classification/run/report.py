"""What a run tells: progress line or bar, the summary CSV, the options it ran with, the picture of its curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Column, Table

from revnets.training.errors import UserError, one_line
from revnets.training.files import whole_file, write_csv
from revnets.training.pictures import picture

SUMMARY, ARGS = "summary.csv", "args.yaml"
MOST_EPOCHS = 10**9
Row = dict[str, float]


class Summary:
    """The CSV with one row per epoch; each change writes the whole file anew, so it is never half a file.

    Args:
        folder: Of the run.
        start_epoch: Rows of earlier epochs are kept, others come from a run that is being repeated.
    """

    def __init__(self, folder: Path, start_epoch: int = 0) -> None:
        self.path = folder / SUMMARY
        self.rows: list[Row] = []
        if start_epoch and self.path.exists():
            self.rows = [row for row in read_summary(self.path) if row["epoch"] < start_epoch]

    def add(self, row: Row) -> None:
        """Appends an epoch and writes the file."""
        self.rows.append(row)
        write_csv(self.path, [{**each, "epoch": int(each["epoch"])} for each in self.rows])


def read_summary(path: Path) -> list[Row]:
    """The rows of a summary CSV; empty cells are left out.

    Raises:
        UserError: It cannot be read, or someone wrote something else into the file.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if "epoch" not in (reader.fieldnames or ["epoch"]):
                raise ValueError("no column 'epoch'")
            rows = [{name: float(text) for name, text in row.items() if text} for row in reader]
        for row in rows:
            epoch = row.get("epoch", math.nan)
            if not (0 <= epoch < MOST_EPOCHS and epoch.is_integer()):
                raise ValueError("a row without an epoch" if math.isnan(epoch) else f"a row of epoch {epoch:g}")
    except (ValueError, TypeError, AttributeError, csv.Error, OSError) as error:
        raise UserError(
            f"'{path}' is no summary of a run ({one_line(error)[:160]}); delete it or choose another --experiment."
        ) from error
    return rows


def write_args(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes `args.yaml`, which `--config` reads back."""
    with whole_file(folder / ARGS) as path:
        path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")


def table(title: str, values: Mapping[str, object]) -> Table:
    """Names and values as a table for the terminal."""
    grid = Table("name", Column("value", overflow="fold"), title=title)
    for name, value in values.items():
        grid.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    return grid


def draw_curves(folder: Path, rows: Sequence[Row], title: str) -> Path | None:
    """Draws loss, accuracy, learning rate, throughput and memory over the epochs into `curves.png`.

    Args:
        folder: Of the run.
        rows: Of its summary.
        title: Above the picture.

    Returns:
        The file, or None where matplotlib is not installed (said in one line).
    """

    def paint(figure: Any) -> None:
        axes = figure.subplots(2, 2)
        plot_rows(axes[0, 0], rows, {"train_loss": "training", "eval_loss": "validation"}, "loss")
        accuracies = {"eval_top1": "top-1", "eval_raw_top1": "top-1 without EMA", "eval_top5": "top-5"}
        plot_rows(axes[0, 1], rows, accuracies, "validation, %")
        plot_rows(axes[1, 0], rows, {"lr": "learning rate"}, "learning rate")
        plot_rows(axes[1, 1], rows, {"train_images_per_s": "images/s"}, "images/s")
        memory = sorted({name for row in rows for name in row if name.endswith("_mb")})
        if memory:
            right = axes[1, 1].twinx()
            names = {name: name.removeprefix("train_").removesuffix("_mb").replace("_", " ") for name in memory}
            plot_rows(right, rows, names, "memory, MB", style="--")

    return picture(folder / "curves.png", (11, 7), paint, title, "; the figures are in summary.csv")


def plot_rows(axis: Any, rows: Sequence[Row], names: Mapping[str, str], label: str, style: str = "-") -> None:
    """Plots columns of a summary over the epochs; columns that no row has are left out.

    Args:
        axis: Of matplotlib.
        rows: Of the summary.
        names: Column to legend.
        label: Of the y axis.
        style: Of the lines.
    """
    for index, (name, legend) in enumerate(names.items()):
        points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
        if points:
            color = f"C{index + (3 if style == '--' else 0)}"
            axis.plot(*zip(*points, strict=True), style, marker=".", label=legend, color=color)
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if label.startswith(("images/s", "memory")):
        axis.set_ylim(bottom=0)
    axis.set_ylabel(label)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small", loc="lower left" if style == "--" else "best")
    axis.grid(alpha=0.3)
