"""``sparse_wide``: all hidden widths times sqrt(1 / (1-s)), and masks for as many FLOPs as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..accounting import count_costs
from ..convert import Converted, Job, Skipped, replace_module
from ..geometry import arguments
from ..registry import SparseConfig
from ..sites import Unsuitable
from ..trace import Trace, trace
from .sparse import sparse_kind
from .widen import WidenError, widen
from .widen_rules import couple

LEAST_DENSITY = 0.5
"""The density that the search leaves to sparse layers is at least this part of ``1 - s``, or widths grow less."""


@dataclass
class _Wider:
    """A wider network with the FLOPs of its layers to be sparsified and of all else."""

    factor: float
    model: nn.Module
    fixed: int
    layers: dict[str, tuple[int, int]]  # name -> dense FLOPs of one image, weights

    def density(self, budget: int) -> float:
        """What all sparse layers would need to meet the budget together."""
        return (budget - self.fixed) / max(1, sum(flops for flops, _ in self.layers.values()))


def widened(job: Job, config: SparseConfig) -> nn.Module:
    """A network sqrt(1/(1-s)) times as wide whose layers are masked to the dense network's FLOPs.

    Args:
        job: the network, its trace and the layers to convert.
        config: their sparsity.

    Raises:
        Unsuitable: where no width is free, or no layer is left.
    """
    recorded: Trace = job.surroundings.trace
    size = recorded.inputs[0].shape[1:]
    budget = count_costs(job.model, size, recorded).sparse_flops
    factor = (1 / (1 - config.sparsity)) ** 0.5
    if not job.names:
        raise Unsuitable(
            f"sparse_wide: no layer of {type(job.model).__name__} can be sparse: {job.report.skipped[-1].reason}"
        )
    wider = _search_width(_maker(job, size), factor, budget, LEAST_DENSITY * (1 - config.sparsity))
    counts = _search_counts(wider, budget)
    model, changed = wider.model, _widths(job.model, wider.model)
    same = [name for name in counts if len(set(changed[name].split(" -> "))) == 1]
    for name, count in counts.items():
        layer: Any = model.get_submodule(name)
        made = sparse_kind(layer)(
            **arguments(layer),
            sparsity=1 - count / layer.weight.numel(),
            count=count,
            init_scale=config.init_scale,
        ).train(layer.training)
        model = replace_module(model, name, made)
        job.report.converted.append(Converted(name, "sparse_wide", f"{changed[name]}, sparsity {made.sparsity:.4f}"))
    stay = [name for name in job.names if name not in counts]
    job.report.skipped += [Skipped(name, "it is not called in the wider network") for name in stay]
    density = sum(counts.values()) / max(1, sum(weights for _, weights in wider.layers.values()))
    note = f"widths x{wider.factor:.3f}, sparsity {1 - density:.4f} to meet the budget (asked for {config.sparsity:g})"
    if wider.factor < factor:
        note += f"; at x{factor:.3f} what stays dense would leave less than half the weights of 1-s"
    if same and wider.factor > 1:
        note += f"; {len(same)} of {len(counts)} layers keep their width, such as {same[0]}"
    job.report.notes.append(f"sparse_wide: {note}")
    return model


def _maker(job: Job, size: tuple[int, ...]) -> Callable[[float], _Wider]:
    """Makes the network wider by a factor: by its own ``widened(factor)``, or by following its widths."""
    own: Any = getattr(job.model, "widened", None)
    coupling = None if own is not None else couple(job.model, job.surroundings.trace)
    if coupling is not None and not coupling.shapes(coupling.widths.sizes(2.0)):
        reasons = sorted(set(coupling.widths.reasons.values()))
        raise Unsuitable(f"sparse_wide: no width of {type(job.model).__name__} is free: {'; '.join(reasons[:3])}")

    def make(factor: float) -> _Wider:
        try:
            if coupling is None:
                model = own(factor)
                recorded = trace(model, size)
            else:
                model, recorded = widen(job.model, coupling, factor, size)
        except WidenError as error:
            raise Unsuitable(f"sparse_wide cannot widen {type(job.model).__name__}: {error}") from error
        for name in ("pretrained_cfg", "default_cfg"):  # timm puts them on the model from outside
            if hasattr(job.model, name):
                setattr(model, name, getattr(job.model, name))
        flops = recorded.flops_by_module()
        modules = dict(model.named_modules())
        layers = {name: (flops[name], modules[name].weight.numel()) for name in job.names if flops.get(name)}
        return _Wider(factor, model, recorded.flops - sum(f for f, _ in layers.values()), layers)

    return make


def _search_width(make: Callable[[float], _Wider], factor: float, budget: int, least: float) -> _Wider:
    """The network ``factor`` times as wide; less, by bisection, where that leaves less than ``least`` density."""
    found = make(factor)
    if found.density(budget) >= least:
        return found
    low, high, best = 1.0, factor, make(1.0)
    for _ in range(6):
        middle = (low + high) / 2
        found = make(middle)
        if found.density(budget) >= least:
            low, best = middle, found
        else:
            high = middle
    return best


def _search_counts(wider: _Wider, budget: int) -> dict[str, int]:
    """How many weights each layer keeps: one density for all, by bisection, and the rest of the budget to one layer."""

    def counts(density: float) -> dict[str, int]:
        return {name: min(n, max(1, round(density * n))) for name, (_, n) in wider.layers.items()}

    def total(kept: dict[str, int]) -> int:
        return wider.fixed + sum(wider.layers[name][0] * k // wider.layers[name][1] for name, k in kept.items())

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if total(counts(middle)) <= budget:
            low = middle
        else:
            high = middle
    kept = counts(low)
    cheap = sorted(wider.layers, key=lambda name: wider.layers[name][0] / wider.layers[name][1])
    for name in cheap[:1]:
        flops, weights = wider.layers[name]
        kept[name] = min(weights, max(1, kept[name] + (budget - total(kept)) * weights // flops))
    return kept


def _widths(before: nn.Module, after: nn.Module) -> dict[str, str]:
    """Shapes of the weights of layers, before and after, in words."""
    old = dict(before.named_modules())
    return {
        name: "x".join(map(str, old[name].weight.shape[:2])) + " -> " + "x".join(map(str, module.weight.shape[:2]))
        for name, module in after.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name in old
    }
