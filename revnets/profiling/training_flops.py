"""What training costs by the schedule of the masks, with what is recomputed; layers and schedules in files."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..layers.accounting import ModelCost
from ..sparsity.accounting import run_flops, step_flops
from ..sparsity.schedules import SCHEDULES, Schedule
from ..training.files import write_csv, write_json
from ..training.pictures import picture

FILES = TABLE, FIGURES, PICTURE = "flops.csv", "flops.json", "flops.png"
PREFIXES = {"P": 1e15, "T": 1e12, "G": 1e9}
COLUMNS = ("layer", "kind", "parameters", "active_parameters", "flops", "sparse_flops", "density")


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a training step, 2 per multiply-add; theoretical, since kernels may multiply the zeros.

    Attributes:
        dense: of the forward pass of the whole batch, as if all weights were there.
        sparse: of it, masked-out weights skipped.
        recomputed: of what the backward pass evaluates anew.

    Example:
        >>> step = TrainingFlops(dense=100, sparse=25, recomputed=25)
        >>> step.run(Schedule("rigl", total_steps=100, interval=10, end=0.5), steps=100)
        10300
        >>> step.average("static"), step.average("rigl", interval=4)
        (100, 115.0)
    """

    dense: float
    sparse: float
    recomputed: float = 0.0

    def run(self, schedule: Schedule, steps: int) -> float:
        """Of the first ``steps`` steps, recomputation included; see ``revnets.sparsity.run_flops``."""
        return run_flops(schedule, self.dense, self.sparse, steps, self.recomputed)

    def average(self, schedule: str, interval: int = 100) -> float:
        """Of a step on average, recomputation included; see ``revnets.sparsity.step_flops``."""
        return step_flops(schedule, self.dense, self.sparse, interval) + self.recomputed


def training_flops(model: nn.Module, costs: ModelCost, images: float = 1) -> TrainingFlops:
    """What a training step of a model costs.

    Args:
        model: in its memory mode.
        costs: of it, by ``count_costs``.
        images: per step, in all processes and accumulated batches.
    """
    return TrainingFlops(costs.flops * images, costs.sparse_flops * images, recomputed_flops(model, costs) * images)


def recomputed_flops(model: nn.Module, costs: ModelCost) -> int:
    """FLOPs of one image in the parts that the backward pass evaluates anew: reversible and checkpointed ones."""
    if any(vars(module).get("grad_checkpointing") is True for module in model.modules()):  # timm's switch
        return costs.sparse_flops
    modes = {name: vars(module).get("mode") for name, module in model.named_modules()}
    parts = tuple(f"{name}." if name else "" for name, mode in modes.items() if mode in ("reversible", "checkpoint"))
    return sum(layer.sparse_flops for layer in costs.layers if f"{layer.name}.".startswith(parts))


def by_schedule(step: TrainingFlops, schedule: Schedule, steps: int) -> dict[str, tuple[float, float]]:
    """FLOPs of the first steps of a run under each schedule with the same settings, and how many of them recompute.

    Args:
        step: of the run.
        schedule: of the run.
        steps: done.
    """
    names = ("static",) if schedule.total_steps is None else SCHEDULES
    return {name: (step.run(replace(schedule, name=name), steps), step.recomputed * steps) for name in names}


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of a network by layer, and of its training by schedule.

    Attributes:
        costs: of the forward pass of one image.
        training: names of schedules, each with the FLOPs and how many of them recompute.
        unit: what ``training`` is of, such as ``image`` or ``10 steps of 64 images``.
        before: of the dense network that ``costs`` is a conversion of, where it is known.
    """

    costs: ModelCost
    training: dict[str, tuple[float, float]]
    unit: str
    before: ModelCost | None = None

    def table(self) -> Any:
        """A rich table of the training by schedule."""
        from rich.table import Table

        table = Table(title=f"Training FLOPs (2 per MAC) of one {self.unit}, theoretical")
        for column in ("schedule", "MFLOPs", "of which recomputed", "x dense"):
            table.add_column(column, justify="left" if column == "schedule" else "right")
        dense, _ = self.training.get("dense", (0.0, 0.0))
        for name, (flops, recomputed) in self.training.items():
            ratio = f"{flops / dense:.3f}" if dense else "-"
            table.add_row(name, f"{flops / 1e6:.2f}", f"{recomputed / 1e6:.2f}", ratio)
        return table

    def write(self, folder: Path) -> list[Path]:
        """Write ``flops.csv`` (by layer) and ``flops.json`` (everything).

        Args:
            folder: to write to; it exists.
        """
        data = {"input_size": self.costs.input_size, "unit_of_training": self.unit, "after": _totals(self.costs)}
        if self.before is not None:
            data |= {"before": _totals(self.before), "layers_before": _rows(self.before)}
        data["training"] = {name: {"flops": f, "recomputed": r} for name, (f, r) in self.training.items()}
        rows = _rows(self.costs)
        return [write_csv(folder / TABLE, rows, COLUMNS), write_json(folder / FIGURES, {**data, "layers": rows})]

    def draw(self, folder: Path, title: str = "") -> Path | None:
        """Draw ``flops.png``: layers dense-equivalent and sparse, and the training by schedule.

        Args:
            folder: to write to; it exists.
            title: above the picture.

        Returns:
            The file; None where matplotlib is not installed.
        """

        def paint(figure: Any) -> None:
            left, right = figure.subplots(1, 2, width_ratios=(3, 1))
            self._draw_layers(left)
            self._draw_training(right)

        return picture(folder / PICTURE, (14, 5.5), paint, title, f"; see {TABLE}")

    def _draw_layers(self, axis: Any) -> None:
        groups = self.groups()
        names, places = list(groups), range(len(groups))
        dense, sparse, former = ([column / 1e6 for column in columns] for columns in zip(*groups.values(), strict=True))
        axis.bar(places, dense, 0.9, color="C1", alpha=0.5, label=f"dense-equivalent: {sum(dense):,.1f}")
        axis.bar(places, sparse, 0.9, color="C0", label=f"sparse: {sum(sparse):,.1f}")
        if self.before is not None:
            label = f"dense network: {sum(former):,.1f}"
            axis.errorbar(places, former, xerr=0.45, fmt="none", ecolor="black", elinewidth=1, label=label)
        shown = range(0, len(names), max(1, len(names) // 40))
        axis.set_xticks(list(shown), [names[i] for i in shown], rotation=90, fontsize=6)
        size = "x".join(map(str, self.costs.input_size))
        axis.set(ylabel=f"MFLOPs of one image {size}", xlim=(-1, len(names)), ylim=(0, 1.2 * max(dense)))
        axis.legend(fontsize="small", title="forward pass, all layers", title_fontsize="small")

    def groups(self) -> dict[str, tuple[int, int, int]]:
        """Dense-equivalent, sparse and former FLOPs of every layer; what a layer was split into counts together."""
        before = {layer.name: layer.flops for layer in (self.before.layers if self.before else ())}
        found: dict[str, tuple[int, int, int]] = {}
        for layer in self.costs.layers:
            name = _ancestor(layer.name, before)
            dense, sparse, _ = found.get(name, (0, 0, 0))
            found[name] = (dense + layer.flops, sparse + layer.sparse_flops, before.get(name, 0))
        return {name: flops for name, flops in found.items() if any(flops)}

    def _draw_training(self, axis: Any) -> None:
        largest = max(flops for flops, _ in self.training.values())
        prefix, unit = next(((p, u) for p, u in PREFIXES.items() if largest >= 10 * u), ("M", 1e6))
        names = list(self.training)
        recomputed = [r / unit for _, r in self.training.values()]
        once = [(f - r) / unit for f, r in self.training.values()]
        axis.bar(names, once, color="C0", label="forward and backward")
        if any(recomputed):
            axis.bar(names, recomputed, bottom=once, color="C3", label="recomputed")
            axis.legend(fontsize="small", loc="lower right")
        for i, (flops, _) in enumerate(self.training.values()):
            axis.text(i, flops / unit, f"{flops / unit:,.2f}", ha="center", va="bottom", fontsize="small")
        axis.set_title(f"training, by schedule, of one {self.unit}", fontsize="small")
        axis.set_ylabel(f"{prefix}FLOPs, theoretical")


def _rows(costs: ModelCost) -> list[dict[str, Any]]:
    return [dict(zip(COLUMNS, (*astuple(layer), layer.density), strict=True)) for layer in costs.layers]


def _totals(costs: ModelCost) -> dict[str, int]:
    return {name: getattr(costs, name) for name in COLUMNS[2:6]}


def _ancestor(name: str, known: Container[str]) -> str:
    """The longest known name that is this one or contains it; itself where there is none."""
    parts = name.split(".")
    return next((head for n in range(len(parts), 0, -1) if (head := ".".join(parts[:n])) in known), name)
