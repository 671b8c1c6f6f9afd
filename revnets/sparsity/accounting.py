"""FLOPs of training by schedule: 2 per multiply-add; theoretical, since a kernel may not skip the zeros."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .found import counts, sparse_layers
from .schedules import SCHEDULES, Schedule


@dataclass(frozen=True)
class LayerFlops:
    """One sparse layer: FLOPs as if dense, and density, counted from its mask."""

    dense: int
    density: float

    @property
    def sparse(self) -> float:
        """FLOPs of the active weights."""
        return self.dense * self.density


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass.

    Attributes:
        dense: of everything, as if all weights were there (``f``).
        sparse: of everything, with the active weights of sparse layers (``f_s``).
        layers: of the sparse layers, by name.
    """

    dense: int
    sparse: float
    layers: dict[str, LayerFlops] = field(repr=False)


@torch.no_grad()
def forward_flops(model: nn.Module, x: Tensor) -> ForwardFlops:
    """Count the FLOPs of ``model(x)`` in eval mode, by its masks.

    Args:
        model: on the device of ``x``; its mode is put back.
        x: e.g. ``(1, C, H, W)``.

    Example:
        >>> forward_flops(nn.Linear(8, 4), torch.ones(2, 8)).dense
        128
    """
    layers = sparse_layers(model)
    owner = {module: i for i, layer in enumerate(layers) for module in layer.modules}
    dense = [0] * len(layers)

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        # an output number is one row of the weight times its window of the input
        dense[owner[module]] += 2 * out.numel() * weight[0].numel()

    training = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(count) for module in owner]
    try:
        with FlopCounterMode(display=False) as counter:
            model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    density = [n / layer.mask.numel() for n, layer in zip(counts(layers), layers, strict=True)]
    found = {
        layer.name: LayerFlops(*pair) for layer, pair in zip(layers, zip(dense, density, strict=True), strict=True)
    }
    total = counter.get_total_flops()
    return ForwardFlops(total, total - sum(each.dense - each.sparse for each in found.values()), found)


def step_flops(schedule: str, dense: float, sparse: float, interval: int = 100) -> float:
    r"""FLOPs of a training step, on average (RigL, 1911.11134, appendix H).

    .. math:: dense: 3f \qquad static, SET: 3 f_s \qquad RigL: (3 f_s \Delta T + 2 f_s + f) / (\Delta T + 1)

    Recomputation is not in it: a reversible network evaluates its forward pass once more, ``f_s``.

    Args:
        schedule: ``dense``, ``static``, ``set`` or ``rigl``.
        dense: ``f``, FLOPs of the forward pass as if all weights were there.
        sparse: ``f_s``, with the active ones; ``f * (1 - s)`` where everything is sparse.
        interval: ``ΔT`` of RigL.

    Raises:
        ValueError: for an unknown schedule.

    Example:
        >>> step_flops("dense", 100, 25), step_flops("static", 100, 25), step_flops("rigl", 100, 25, interval=4)
        (300, 75, 90.0)
    """
    if schedule == "dense":
        return 3 * dense
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: expected one of dense, {', '.join(SCHEDULES)}")
    if schedule == "rigl":
        return (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)
    return 3 * sparse


def run_flops(schedule: Schedule, dense: float, sparse: float, steps: int) -> float:
    """FLOPs of the first ``steps`` training steps, counted step by step rather than on average.

    A step that gathers dense gradients costs ``2 f_s + f``, every other one ``3 f_s``; after its end RigL costs what
    ``static`` costs.

    Args:
        schedule: of the masks.
        dense: ``f`` of a step, for the whole batch.
        sparse: ``f_s`` of a step.
        steps: done so far.

    Example:
        >>> run_flops(Schedule("rigl", total_steps=100, interval=10, end=0.5), dense=100, sparse=25, steps=100)
        7800
    """
    gathered = schedule.updates(steps) if schedule.name == "rigl" else 0
    return 3 * sparse * steps + (dense - sparse) * gathered
