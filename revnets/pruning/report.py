"""What pruning did, layer by layer: as a table, as files, as a picture."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..layers.convert import Skipped
from ..training.files import write_csv, write_json
from ..training.pictures import picture


@dataclass
class PrunedLayer:
    """What became of one layer.

    Attributes:
        name: in the model.
        kind: class and sizes.
        weights: how many there are.
        zeros: how many of them are 0.
        error: of the layer's outputs on the calibration images, ``|WX - W'X|^2 / |WX|^2``.
        damping: that SparseGPT needed, relative to the mean of the Hessian's diagonal.
        seconds: it took, its share of the pass over the images included.
        note: a remark, or nothing.
    """

    name: str
    kind: str
    weights: int
    zeros: int
    error: float
    damping: float = 0.0
    seconds: float = 0.0
    note: str = ""

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights


@dataclass
class PruningReport:
    """What ``prune`` did.

    Attributes:
        model: the pruned network, of torch's own layers.
        method: ``sparsegpt``, ``wanda`` or ``magnitude``.
        target: the sparsity or the pattern that was asked for.
        distribution: of the sparsity over the layers.
        images: how many it was calibrated on.
        layers: those that were pruned, in running order.
        skipped: those that were not, each with the reason.
        flops: of the forward pass of one image, by module.
        recalibrated: how many batch norms had their statistics corrected.
        seconds: it all took.
    """

    model: nn.Module
    method: str
    target: str
    distribution: str
    images: int
    layers: list[PrunedLayer] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    flops: dict[str, int] = field(default_factory=dict)
    recalibrated: int = 0
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of the pruned layers."""
        return sum(layer.zeros for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def model_sparsity(self) -> float:
        """Share of zeros among all parameters of the model that this pruning made or kept."""
        return sum(layer.zeros for layer in self.layers) / sum(p.numel() for p in self.model.parameters())

    @property
    def dense_flops(self) -> int:
        """Of the forward pass of one image, 2 per multiply-add."""
        return sum(self.flops.values())

    @property
    def sparse_flops(self) -> int:
        """The same without multiplications by the zeros; theoretical, since most kernels multiply them."""
        saved = sum(self.flops.get(layer.name, 0) * layer.zeros // layer.weights for layer in self.layers)
        return self.dense_flops - saved

    @property
    def error(self) -> float:
        """Geometric mean of the layers' errors; layers without any count as 1e-12."""
        logs = [math.log(max(layer.error, 1e-12)) for layer in self.layers]
        return math.exp(sum(logs) / len(logs))

    def __str__(self) -> str:
        lines = [
            f"  {layer.name}: {layer.kind}, sparsity {layer.sparsity:.4f}, error {layer.error:.4g}"
            + (f" ({layer.note})" if layer.note else "")
            for layer in self.layers
        ]
        return "\n".join([self.summary(), *lines, *(f"  {s.name}: skipped, {s.reason}" for s in self.skipped)])

    def summary(self) -> str:
        """Sparsity, FLOPs, error and time in one line."""
        return (
            f"{self.method} {self.target}: {len(self.layers)} layers of sparsity {self.sparsity:.4f} "
            f"({self.model_sparsity:.4f} of all parameters), {len(self.skipped)} left out; MFLOPs per image "
            f"{self.dense_flops / 1e6:.2f} dense, {self.sparse_flops / 1e6:.2f} without zeros; mean error "
            f"{self.error:.4g} on {self.images} images; {self.recalibrated} batch norms corrected; "
            f"{self.seconds:.1f} s"
        )

    def table(self) -> Any:
        """A rich table of the pruned layers."""
        from rich.table import Table

        table = Table(title="Pruned layers", caption=self.summary())
        for column in ("layer", "kind"):
            table.add_column(column)
        for column in ("zeros / weights", "sparsity", "error", "damping", "s"):
            table.add_column(column, justify="right")
        table.add_column("remark")
        for layer in self.layers:
            counts = (f"{layer.zeros} / {layer.weights}", f"{layer.sparsity:.4f}", f"{layer.error:.3g}")
            table.add_row(layer.name, layer.kind, *counts, f"{layer.damping:g}", f"{layer.seconds:.2f}", layer.note)
        return table

    def records(self) -> list[dict[str, Any]]:
        """One flat dictionary per pruned layer."""
        return [
            {**dataclasses.asdict(layer), "sparsity": layer.sparsity, "flops": self.flops.get(layer.name, 0)}
            for layer in self.layers
        ]

    def save(self, stem: Path) -> list[Path]:
        """Write the figures beside the weights: ``stem`` with ``.json``, ``.csv`` and, with matplotlib, ``.png``."""
        rows = self.records()
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("model", "layers", "skipped", "flops")]
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        more = ("sparsity", "model_sparsity", "dense_flops", "sparse_flops", "error")
        found |= {name: getattr(self, name) for name in more}
        found |= {"layers": rows, "skipped": [dataclasses.asdict(one) for one in self.skipped]}
        paths = [write_json(stem.with_suffix(".json"), found), write_csv(stem.with_suffix(".csv"), rows)]
        title = f"{type(self.model).__name__}: {self.method} {self.target}, {self.images} images"
        drawn = picture(stem.with_suffix(".png"), (11, 6), self._paint, title)
        return [*paths, drawn] if drawn else paths

    def _paint(self, figure: Any) -> None:
        """Error and sparsity by layer, in running order."""
        upper, lower = figure.subplots(2, 1, sharex=True)
        places = range(len(self.layers))
        upper.semilogy(places, [max(layer.error, 1e-12) for layer in self.layers], "o-", markersize=3)
        upper.set_ylabel("error of the layer's outputs")
        upper.grid(which="both", alpha=0.3)
        lower.bar(places, [layer.sparsity for layer in self.layers], width=0.9)
        lower.set(ylabel="sparsity", ylim=(0, 1))
        shown = places[:: max(1, len(self.layers) // 40)]
        lower.set_xticks(list(shown), [self.layers[i].name for i in shown], rotation=90, fontsize=6)
