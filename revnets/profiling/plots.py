"""Pictures of predictions."""

from pathlib import Path
from typing import Any

from .predict import CATEGORIES
from .profile import Row
from .report import write


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "pictures need matplotlib: pip install 'revnets[quickstart]', or leave --output out"
        ) from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    return write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def timeline(row: Row, folder: Path) -> Path:
    """Bytes by category over one step, as ``timeline_NAME_SIZE_BATCH_MODE.png``."""
    p, t = row.predicted, row.target
    figure, axes = _axes(f"{t}, {t.mode_name}: predicted", "allocations, in order", "allocated, MB")
    columns = list(zip(*p.timeline, strict=True))
    drawn = [i for i in range(len(CATEGORIES)) if any(columns[i])]
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
    return _save(figure, folder / f"timeline_{t.name}_{t.img_size}_{t.batch_size}_{t.mode}.png")
