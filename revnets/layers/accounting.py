"""FLOPs and parameters of a model, layer by layer: dense-equivalent and sparse, counted from the masks.

Sparse FLOPs are theoretical: kernels at hand multiply the zeros as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..sparsity.found import is_sparse
from .trace import Trace, trace


@dataclass(frozen=True)
class LayerCost:
    """What a module itself (not its children) costs for one image.

    Attributes:
        name: in the model.
        kind: class.
        parameters: how many numbers it has.
        active_parameters: those that no mask takes out.
        flops: dense-equivalent, 2 per multiply-add (MAC).
        sparse_flops: with masked-out weights skipped.
    """

    name: str
    kind: str
    parameters: int
    active_parameters: int
    flops: int
    sparse_flops: int

    @property
    def density(self) -> float:
        """Sparse over dense-equivalent FLOPs."""
        return self.sparse_flops / self.flops if self.flops else 1.0


@dataclass(frozen=True)
class ModelCost:
    """Costs of all modules that have parameters or FLOPs, for one image of a size."""

    layers: tuple[LayerCost, ...]
    input_size: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        """Those that no mask takes out."""
        return sum(layer.active_parameters for layer in self.layers)

    @property
    def flops(self) -> int:
        """Dense-equivalent FLOPs of the forward pass of one image, 2 per MAC."""
        return sum(layer.flops for layer in self.layers)

    @property
    def sparse_flops(self) -> int:
        """FLOPs of the forward pass of one image with masked-out weights skipped."""
        return sum(layer.sparse_flops for layer in self.layers)

    def table(self) -> Any:
        """A rich table of the layers that multiply."""
        from rich.table import Table

        table = Table(title=f"FLOPs of one image {'x'.join(map(str, self.input_size))} (2 per MAC)")
        for column in ("layer", "kind", "active / parameters", "dense-equivalent MFLOPs", "sparse MFLOPs", "density"):
            table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
        for layer in (*(one for one in self.layers if one.flops), self._total()):
            counts = f"{layer.active_parameters} / {layer.parameters}"
            work = (f"{layer.flops / 1e6:.2f}", f"{layer.sparse_flops / 1e6:.2f}")
            table.add_row(layer.name, layer.kind, counts, *work, f"{layer.density:.4f}")
        return table

    def _total(self) -> LayerCost:
        return LayerCost("total", "", self.parameters, self.active_parameters, self.flops, self.sparse_flops)


def count_costs(model: nn.Module, input_size: Sequence[int], recorded: Trace | None = None) -> ModelCost:
    """FLOPs and parameters of every module, for one example; the model is traced without memory and left as it is.

    Matrix products and convolutions count (attention's included), elementwise work and norms do not. A layer with a
    ``mask`` does ``active / all`` of its dense-equivalent FLOPs. On the meta device, where masks have no values, the
    layer's ``sparsity`` says how many are active.

    Args:
        model: any.
        input_size: of one example, such as ``(3, 224, 224)``.
        recorded: a trace of the model on such an example, if there is one already.

    Raises:
        TraceError: when the model does not take such an input.

    Example:
        >>> cost = count_costs(nn.Conv2d(3, 8, 3, padding=1), (3, 16, 16))
        >>> cost.flops == 2 * 3 * 8 * 3 * 3 * 16 * 16, cost.parameters
        (True, 224)
    """
    flops = (recorded or trace(model, input_size)).flops_by_module()
    layers: list[LayerCost] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(map(id, own))
        parameters, dense = sum(p.numel() for p in own), flops.get(name, 0)
        if not (parameters or dense):
            continue
        weights, kept = _mask_counts(module)
        masked = (weights - kept) if own else 0
        sparse = dense * kept // weights if weights else dense
        layers.append(LayerCost(name, type(module).__name__, parameters, parameters - masked, dense, sparse))
    return ModelCost(tuple(layers), tuple(input_size))


def _mask_counts(module: nn.Module) -> tuple[int, int]:
    """How many weights a layer has and how many its mask keeps; ``(0, 0)`` without a mask."""
    if not is_sparse(module):
        return 0, 0
    mask: Any = module.mask
    if mask.device.type == "meta":
        return mask.numel(), max(1, round((1 - float(module.sparsity)) * mask.numel()))  # type: ignore[arg-type]
    return mask.numel(), int(mask.sum())
