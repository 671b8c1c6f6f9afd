"""Tables, JSON and pictures of engines side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any

from ..training.files import write_csv, write_json
from ..training.pictures import picture
from .by_layer import LayerTime, by_kind
from .compare import EXPLOITS, Measurement, machine, speedups
from .report import say


def print_measurements(title: str, found: Sequence[Measurement]) -> None:
    """A table of measurements, each with how many times as fast it is as the fastest dense engine of its case: of the
    same class of accuracy (float32, or INT8 and bfloat16), and of all."""
    from rich.table import Table

    caption = (
        "x dense: times as fast as the fastest dense engine of the same class of accuracy (float32; INT8 and "
        "bfloat16), '-' where there is none; x all dense: as the fastest dense one of all"
    )
    table = Table(title=f"{title}, medians of interleaved calls ({machine()})", caption=caption)
    words = ("case", "engine", "kernels", "zeros that it exploits")
    ratios_of = ("x dense", "CPU ms", "x dense (CPU)", "x all dense")
    for column in ("case", "batch", "sparsity", "threads", "engine", "precision", "ms", *ratios_of, *words[2:]):
        table.add_column(column, justify="left" if column in words else "right", overflow="fold")
    ratios = zip(speedups(found), speedups(found, cpu=True), speedups(found, any_precision=True), strict=True)
    for (m, wall), (_, cpu), (_, of_all) in ratios:
        times = tuple("-" if isnan(ratio) else f"{ratio:.2f}" for ratio in (wall, cpu, of_all))
        numbers = (f"{1e3 * m.seconds:.3f}", times[0], f"{1e3 * m.cpu_seconds:.3f}", *times[1:])
        what = (m.kernels or "it does not tell", EXPLOITS.get(m.engine, "none"))
        row = (m.case, str(m.batch_size), f"{m.sparsity:g}", str(m.threads), m.engine, m.precision, *numbers, *what)
        table.add_row(*row)
    say(table)


def print_layer_times(found: Sequence[LayerTime]) -> None:
    """A table per network, sparsity and number of threads: milliseconds by kind of layer on each engine."""
    from rich.table import Table

    for case in dict.fromkeys((one.case, one.sparsity, one.threads) for one in found):
        here = [one for one in found if (one.case, one.sparsity, one.threads) == case]
        engines = list(dict.fromkeys(one.engine for one in here))
        title = f"{case[0]}, {case[1]:g} zeros, {case[2]} threads, within whole runs ({machine()})"
        caption = "medians, of OpenVINO means; layers that are computed together count as the first of them"
        table = Table(title=title, caption=caption)
        table.add_column("kind of layer", overflow="fold")
        for column in (column for engine in engines for column in (f"{engine}: calls", "ms")):
            table.add_column(column, justify="right")
        total = ("all", {engine: _sum([one for one in here if one.engine == engine]) for engine in engines})
        for kind, by_engine in (*by_kind(here), total):
            cells = [by_engine.get(engine, (0, 0.0)) for engine in engines]
            table.add_row(kind, *(text for count, seconds in cells for text in (str(count), f"{1e3 * seconds:.3f}")))
        say(table)


def _sum(found: Sequence[LayerTime]) -> tuple[int, float]:
    return len(found), sum(one.seconds for one in found)


def save_measurements(
    folder: Path, found: Sequence[Measurement], layers: Sequence[Measurement], parts: Sequence[LayerTime] = ()
) -> list[Path]:
    """Writes ``deploy.json``, ``layers.csv`` where there are ``parts``, and, with matplotlib, ``deploy.png``."""
    data = {"machine": machine(), "networks": _records(found), "layers": _records(layers)}
    path, drawn = write_json(folder / "deploy.json", data), _draw(folder, found) if found else None
    tables = [write_csv(folder / "layers.csv", map(asdict, parts))] if parts else []
    return [path, *tables, *([drawn] if drawn else [])]


def _records(found: Sequence[Measurement]) -> list[dict[str, Any]]:
    both = zip(speedups(found), speedups(found, any_precision=True), strict=True)
    return [
        {**asdict(m), "times_dense": None if isnan(ratio) else ratio, "times_all_dense": of_all}
        for (m, ratio), (_, of_all) in both
    ]


def _draw(folder: Path, found: Sequence[Measurement]) -> Path | None:
    """Time over sparsity, a panel per network and number of threads; nothing without matplotlib."""
    panels = list(dict.fromkeys((m.case, m.batch_size, m.threads) for m in found))

    def paint(figure: Any) -> None:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            here = [m for m in found if (m.case, m.batch_size, m.threads) == panel]
            for engine in dict.fromkeys(m.engine for m in here):
                points = sorted((m.sparsity, 1e3 * m.seconds) for m in here if m.engine == engine)
                axes.plot(*zip(*points, strict=True), "o-", label=engine)
            title = f"{panel[0]}, batch {panel[1]}, {panel[2]} threads"
            axes.set(title=title, xlabel="sparsity", ylabel="ms per call, median")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")

    return picture(folder / "deploy.png", (5 * len(panels), 4), paint, dpi=150)
