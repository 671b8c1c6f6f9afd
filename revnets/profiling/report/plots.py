"""Pictures of predictions."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...training.pictures import caption, picture
from ..predict import CATEGORIES
from ..profile import Row
from ..sweep import family
from .tables import activations_per_image


def _plot(path: Path, title: str, xlabel: str, ylabel: str, paint: Callable[[Any], None]) -> Path | None:
    def labelled(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.set(title=caption(title), xlabel=xlabel, ylabel=ylabel)
        paint(axes)

    return picture(path, (8, 5), labelled, dpi=150)


def timeline(row: Row, folder: Path) -> Path | None:
    """Bytes by category over one step, as ``timeline_NAME_SIZE_BATCH_MODE.png``; None without matplotlib."""
    p, t = row.predicted, row.target
    columns = list(zip(*p.timeline, strict=True))
    drawn = [i for i in range(len(CATEGORIES)) if any(columns[i])]

    def paint(axes: Any) -> None:
        axes.stackplot(
            range(len(p.timeline)),
            *([v / 1e6 for v in columns[i]] for i in drawn),
            labels=[CATEGORIES[i] for i in drawn],
            colors=[f"C{i}" for i in drawn],
            step="post",
            linewidth=0,
        )
        for phase in ("backward", "optimizer"):
            if phase in p.phases:
                axes.axvline(p.phases.index(phase), color="black", linewidth=0.8, linestyle=":")
                axes.annotate(phase, (p.phases.index(phase), p.peak_bytes / 1e6), rotation=90, va="top", ha="right")
        axes.axhline(p.peak_bytes / 1e6, color="black", linewidth=0.8, label=f"peak {p.peak_bytes / 1e6:.1f} MB")
        axes.set_xlim(0, len(p.timeline))
        axes.legend(loc="lower right", fontsize="small")

    name = t.title.replace(" + ", "-").replace(" ", "_")
    path = folder / f"timeline_{name}_{t.img_size}_{t.batch_size}_{t.mode}.png"
    return _plot(path, f"{t}, {t.mode_name}: predicted", "allocations, in order", "allocated, MB", paint)


def sweep(kind: str, rows: Sequence[Row], folder: Path) -> Path | None:
    """Predicted activation memory per image, as ``KIND.png``: one line per family and mode; None without matplotlib.

    Args:
        kind: see ``sweep.KINDS``; says what is on the horizontal axis.
        rows: of the targets of the sweep.
        folder: to write to.
    """
    label, position = _HORIZONTAL[kind]
    lines: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        name = family(row.target.name) if kind == "families" else row.target.title
        lines[name, row.target.mode_name].append((position(row), activations_per_image(row) / 1e6))
    names = sorted({name for name, _ in lines})

    def paint(axes: Any) -> None:
        for (name, mode), points in lines.items():
            color = f"C{names.index(name)}" if kind == "families" else None
            style = {"plain": "-", "store": "-", "reversible": "-"}.get(mode, "--")
            marker = "o" if mode == "reversible" else "s" if style == "-" else "^"
            axes.plot(*zip(*sorted(points), strict=True), marker + style, color=color, label=f"{name}, {mode}")
        if kind != "depth":
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(which="both", alpha=0.3)
        axes.legend(fontsize="small")

    return _plot(folder / f"{kind}.png", f"{', '.join(names)}: predicted", label, "activations, MB per image", paint)


_HORIZONTAL: dict[str, tuple[str, Callable[[Row], float]]] = {
    "families": ("GMACs per image", lambda row: row.predicted.macs / row.target.batch_size / 1e9),
    "depth": ("extra silos (necks: repetitions)", lambda row: next(iter(dict(row.target.options).values()), 0)),
    "resolution": ("side of the image, pixels", lambda row: row.target.img_size),
}
