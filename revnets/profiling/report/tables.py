"""Profiles as a table on the terminal and as files."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...training.files import write_csv, write_json
from ..fit import Fit
from ..predict import CATEGORIES
from ..profile import Row, describe, recomputation
from ..target import Setting


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as flat dictionaries of numbers (bytes, FLOPs, seconds) and words, one per target."""
    overhead = recomputation(rows)
    return [
        {
            **row.target.columns(),
            "parameters": row.predicted.parameters,
            "macs_per_image": row.predicted.macs // row.target.batch_size,
            "flops_per_image": 2 * row.predicted.macs // row.target.batch_size,
            "training_flops": row.predicted.training_flops,
            "recomputation": overhead.get(row.target),
            "predicted_peak_bytes": row.predicted.peak_bytes,
            **{f"predicted_{name.replace(' ', '_')}_bytes": row.predicted.categories[name] for name in CATEGORIES},
            "predicted_peak_at": f"{row.predicted.peak_phase}: {row.predicted.peak_where}",
            "measured_peak_allocated_bytes": row.measured_bytes,
            "measured_peak_reserved_bytes": row.measured.reserved_bytes if row.measured else None,
            "error": row.error,
            "step_seconds": row.measured.seconds if row.measured else None,
            "not_measured_because": row.note or None,
            "prediction_seconds": row.seconds,
        }
        for row in rows
    ]


def print_rows(rows: Sequence[Row], setting: Setting) -> None:
    """Two tables: memory by category, predicted and measured; arithmetic and time."""
    from rich.console import Console
    from rich.table import Table

    names = ("network", "mode")
    memory = Table(title=f"Memory of one training step, MB of 10^6 bytes ({describe(setting)})")
    shown = ["predicted peak", *CATEGORIES, "measured allocated", "reserved", "error"]
    for column in (*names, *shown):
        memory.add_column(column, justify="left" if column in names else "right")
    cost = Table(title="Arithmetic (1 MAC = 2 FLOPs) and time")
    for column in (
        *names,
        "parameters, M",
        "GMACs/image",
        "GFLOPs/image",
        "training GFLOPs/step",
        "x store",
        "step, s",
    ):
        cost.add_column(column, justify="left" if column in names else "right")
    overhead = recomputation(rows)
    for row in rows:
        p, m, head = row.predicted, row.measured, (str(row.target), row.target.mode_name)
        memory.add_row(
            *head,
            _mb(p.peak_bytes),
            *(_mb(p.categories[c]) for c in CATEGORIES),
            _mb(row.measured_bytes),
            _mb(m.reserved_bytes if m else None),
            "-" if row.error is None else f"{100 * row.error:+.1f}%",
        )
        cost.add_row(
            *head,
            f"{p.parameters / 1e6:.1f}",
            f"{p.macs / row.target.batch_size / 1e9:.2f}",
            f"{2 * p.macs / row.target.batch_size / 1e9:.2f}",
            f"{p.training_flops / 1e9:.1f}",
            f"{overhead[row.target]:.2f}" if row.target in overhead else "-",
            f"{m.seconds:.3f}" if m else "-",
        )
    console = Console(width=190)
    console.print(memory)
    console.print(cost)
    for row in rows:
        note = f"; not measured: {row.note}" if row.note else ""
        where = f"peak in {row.predicted.peak_phase}, {row.predicted.peak_where}"
        console.print(
            f"{row.target} {row.target.mode_name}: {where}; predicted in {row.seconds:.1f} s{note}", style="dim"
        )


def print_sweep(kind: str, rows: Sequence[Row], setting: Setting) -> None:
    """One table: size, arithmetic and memory of many networks."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{kind}, predicted ({describe(setting)})")
    for column in (
        "network",
        "mode",
        "depth",
        "GMACs/image",
        "peak, MB",
        "of it gradients",
        "activations, MB/image",
    ):
        table.add_column(column, justify="left" if column in ("network", "mode") else "right")
    for row in rows:
        p, t = row.predicted, row.target
        silos = next(iter(dict(t.options).values()), "-")
        macs, gradients = f"{p.macs / t.batch_size / 1e9:.2f}", _mb(p.categories["gradients"])
        table.add_row(
            str(t), t.mode_name, str(silos), macs, _mb(p.peak_bytes), gradients, _mb(activations_per_image(row))
        )
    Console(width=140).print(table)


def activations_per_image(row: Row) -> int:
    """Peak of what a step allocates, less one copy of the gradients, per image: what ``revnets bench`` measures."""
    return (row.predicted.step_bytes - row.predicted.gradient_bytes) // row.target.batch_size


def print_fits(fits: Sequence[Fit], budget: int, what: str) -> None:
    """A table of what fits."""
    from rich.console import Console
    from rich.table import Table

    title = f"Largest {what} that fits {budget / 1e9:.4g} GB ({budget / 2**30:.4g} GiB) of allocated tensors, predicted"
    table = Table(title=title)
    for column in ("network", "mode", "batch", "image", "predicted peak, MB", f"next {what}, MB"):
        table.add_column(column, justify="left" if column in ("network", "mode") else "right")
    for found in fits:
        t = found.target
        sizes = (str(t.batch_size), str(t.img_size), _mb(found.predicted.peak_bytes), _mb(found.next_bytes))
        table.add_row(t.title, t.mode_name, *sizes)
    Console(width=140).print(table)


def _mb(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.1f}"


def save_json(found: Sequence[dict[str, Any]], setting: Setting, path: Path) -> Path:
    """Rows with machine and setting."""
    return write_json(path, {"machine": describe(setting), "setting": asdict(setting), "rows": list(found)})


def save_records(found: Sequence[dict[str, Any]], setting: Setting, folder: Path, name: str) -> list[Path]:
    """``name.json`` (with machine and setting) and ``name.csv`` in ``folder``."""
    return [save_json(found, setting, folder / f"{name}.json"), write_csv(folder / f"{name}.csv", found)]


def fit_records(fits: Sequence[Fit], budget: int) -> list[dict[str, Any]]:
    """Fits as flat dictionaries."""
    return [
        {
            **f.target.columns(),
            "budget_bytes": budget,
            "predicted_peak_bytes": f.predicted.peak_bytes,
            "next_larger_bytes": f.next_bytes,
            "predictions": f.probes,
        }
        for f in fits
    ]
