"""What became of the masks, as a table and as a picture."""

from pathlib import Path
from typing import Any

from ..sparsity import SparsityController
from .files import write_csv
from .pictures import picture

TABLE, PICTURE = "sparsity.csv", "sparsity.png"
COLUMNS = ("step", "layer", "weights", "active", "density", "fraction", "exchanged", "changed")


def rows(controller: SparsityController) -> list[dict[str, Any]]:
    """One row per change and layer, after one per layer of how it is now (step 0, nothing exchanged).

    Args:
        controller: of the run.
    """
    sizes = {layer.name: layer.mask.numel() for layer in controller.layers}
    density = controller.density
    found = [
        dict(zip(COLUMNS, (0, name, n, round(density[name] * n), density[name], 0.0, 0, 0), strict=True))
        for name, n in sizes.items()
    ]
    for update in controller.history:
        columns = zip(sizes.items(), update.active, update.exchanged, update.changed, strict=True)
        for (name, n), active, swapped, changed in columns:
            values = (update.step, name, n, active, active / n, update.fraction, swapped, changed)
            found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def write_table(controller: SparsityController, folder: Path) -> Path:
    """Write ``sparsity.csv``: density, exchanged and changed weights of every layer at every change.

    Args:
        controller: of the run.
        folder: to write to; it exists.
    """
    return write_csv(folder / TABLE, rows(controller), COLUMNS)


def draw_picture(controller: SparsityController, folder: Path, title: str = "") -> Path | None:
    """Draw ``sparsity.png``: density by layer, and the share of active weights that is new at every change.

    Args:
        controller: of the run.
        folder: to write to; it exists.
        title: above the picture.

    Returns:
        The file; None where matplotlib is not installed.
    """

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        _draw_density(left, controller)
        _draw_changes(right, controller)

    return picture(folder / PICTURE, (11, 5), paint, title, f"; see {TABLE}")


def _draw_density(axis: Any, controller: SparsityController) -> None:
    density = controller.density
    sizes = [layer.mask.numel() for layer in controller.layers]
    mean = sum(d * n for d, n in zip(density.values(), sizes, strict=True)) / sum(sizes)
    axis.bar(range(len(density)), list(density.values()), width=0.9)
    axis.axhline(mean, color="black", linewidth=0.8, label=f"all {sum(sizes):,} weights: {mean:.4f}")
    shown = range(0, len(density), max(1, len(density) // 20))
    names = list(density)
    axis.set_xticks(list(shown), [names[i] for i in shown], rotation=90, fontsize=6)
    axis.set(ylabel="density", ylim=(0, None))
    axis.legend(fontsize="small")


def _draw_changes(axis: Any, controller: SparsityController) -> None:
    history = controller.history
    steps = [u.step for u in history]
    for i in range(len(controller.layers)):
        share = [u.changed[i] / max(u.active[i], 1) for u in history]
        axis.plot(steps, share, color="C0", linewidth=0.6, alpha=0.3, label="each layer" if i == 0 else None)
    if history:
        axis.plot(steps, [sum(u.changed) / max(sum(u.active), 1) for u in history], "C1.-", label="all layers")
        axis.plot(steps, [u.fraction for u in history], "k:", linewidth=0.8, label="dropped")
        axis.legend(fontsize="small")
    else:
        axis.text(0.5, 0.5, f"{controller.schedule.name}: no changes", ha="center", transform=axis.transAxes)
    axis.set(xlabel="step", ylabel="new among the active weights", ylim=(0, None))
    axis.grid(alpha=0.3)
