"""Measurements of FP8 layers: rows, the break-even table made of them, how both are printed and written."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..layers.munit.break_even import KINDS, POINTWISE, device_kind
from ..training.files import write_json

PLAIN, OURS, TRITON, TORCHAO = "plain", "mus_fp8", "mus_fp8, triton", "torchao dynamic"


@dataclass(frozen=True)
class Row:
    """One layer measured: median seconds of forward and backward pass, and the median over rounds of its speed-up.

    ``speedup`` is that over the plain layer in the same mode and round. ``backend`` is what multiplied; ``emulated``
    says that the time is none of FP8 units. The last two are of the forward pass alone.
    """

    kind: str
    rows: int
    width: int
    mode: str
    layer: str
    backend: str
    seconds: float
    speedup: float
    emulated: bool = False
    forward_seconds: float | None = None
    forward_speedup: float | None = None


def break_even(rows: Sequence[Row]) -> dict[str, list[tuple[int, int | None]]]:
    """The least width from which on FP8 is faster at all larger ones, in every mode measured, by rows; None for never.

    Where 1x1 convolutions were computed by Triton, too, also from where on that is faster than ``scaled_mm``.

    Example:
        >>> def row(width, layer, speedup):
        ...     return Row("linear", 64, width, "eager", layer, "", 1.0, speedup)
        >>> break_even([row(256, OURS, 1.1), row(512, OURS, 0.9), row(1024, OURS, 1.2), row(2048, OURS, 1.4)])
        {'linear': [(64, 1024)], '1x1 conv': [], '3x3 conv': []}
    """
    found: dict[str, list[tuple[int, int | None]]] = {kind: [] for kind in KINDS}
    ours = [r for r in rows if r.layer == OURS]
    for kind, count in sorted({(r.kind, r.rows) for r in rows}):
        found[kind].append((count, _least((r.width, r.speedup) for r in ours if (r.kind, r.rows) == (kind, count))))
    matrices = {(r.rows, r.width, r.mode): r.seconds for r in ours if r.kind == "1x1 conv"}
    triton = [r for r in rows if r.layer == TRITON and (r.rows, r.width, r.mode) in matrices]
    for count in sorted({r.rows for r in triton}):
        ratios = ((r.width, matrices[count, r.width, r.mode] / r.seconds) for r in triton if r.rows == count)
        found.setdefault(POINTWISE, []).append((count, _least(ratios)))
    return found


def _least(speedups: Iterable[tuple[int, float]]) -> int | None:
    """The least width from which on all speed-ups are above 1."""
    slower: dict[int, bool] = {}
    for width, speedup in speedups:
        slower[width] = slower.get(width, False) or speedup <= 1
    least = None
    for width in sorted(slower, reverse=True):
        if slower[width]:
            break
        least = width
    return least


def describe(device: torch.device) -> str:
    """The machine and versions, in words."""
    where = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    if device.type != "cpu":
        where = torch.get_device_module(device).get_device_name(device)
    return f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def print_rows(rows: Sequence[Row], device: torch.device, repeats: int) -> None:
    """The measurements, medians of so many rounds, and the break-even table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Forward and backward in bfloat16, medians of {repeats} ({describe(device)})")
    words = ("kind", "mode", "layer", "multiplied by")
    for column in ("kind", "rows", "width", "mode", "layer", "multiplied by", "ms", "speed-up over plain", "forward"):
        table.add_column(column, justify="left" if column in words else "right")
    for r in rows:
        sizes = (r.kind, str(r.rows), str(r.width))
        forward = "" if r.forward_speedup is None else f"{r.forward_speedup:.2f}"
        table.add_row(*sizes, r.mode, r.layer, r.backend, f"{1e3 * r.seconds:.3f}", f"{r.speedup:.2f}", forward)
    console = Console(width=140)
    console.print(table)
    if any(r.emulated for r in rows):
        console.print("FP8 is EMULATED here: the speed of mus_fp8 says nothing of FP8 units", style="bold")
    limits = Table(title=f"Break-even on {device_kind(device)}: mus_fp8 is faster from this width on")
    for column in ("kind", "rows", "width"):
        limits.add_column(column)
    for kind, points in break_even(rows).items():
        for count, width in points:
            limits.add_row(kind, str(count), "at no width measured" if width is None else str(width))
    console.print(limits)


def write_table(rows: Sequence[Row], device: torch.device | str, path: Path) -> None:
    """Write what ``mus_fp8:auto`` reads as a table, complete or not at all.

    Args:
        rows: of ``run``.
        device: where they were measured.
        path: of the JSON file.
    """
    data = {
        "device": device_kind(device),
        "machine": describe(torch.device(device)),
        "break_even": break_even(rows),
        "rows": [asdict(row) for row in rows],
    }
    write_json(path, data)
