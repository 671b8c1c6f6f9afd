"""Masks found from the zeros of a pruned network, so that training keeps them."""

from __future__ import annotations

from typing import Any

from timm.layers import Conv2dSame
from torch import nn

from ..layers.convert import replace_module
from ..layers.geometry import arguments
from ..layers.sparse_ift.sparse import sparse_kind


def keep_zeros(model: nn.Module) -> list[str]:
    """Put a fixed mask over every weight that holds zeros, in place: training then leaves the zeros alone.

    The masks are no part of the state dict, as the zeros say where they are: checkpoints stay those of the plain
    network. ``SparsityController(model, optimizer, "static")`` also keeps what an optimizer adds at 0. Weights without
    any zero, or all zero (initialised so), get no mask.

    Args:
        model: with torch's own ``nn.Conv2d`` and ``nn.Linear``, or timm's ``Conv2dSame``; their weights and gradients'
            switches stay.

    Returns:
        Names of the layers that have a mask now.

    Raises:
        ValueError: where no layer holds zeros, or tied weights do.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> net[0].weight.data[:, :2] = 0
        >>> keep_zeros(net), list(net.state_dict()), int(net[0].mask.sum())
        (['0'], ['0.weight', '0.bias', '1.weight', '1.bias'], 8)
    """
    found = [name for name, module in model.named_modules() if _holds_zeros(module)]
    if not found:
        raise ValueError("no layer holds zeros: prune the network first, such as with revnets.prune")
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and (other := owners.setdefault(id(weight), name)) != name:
            tied = {other, name} & set(found)
            if tied:
                raise ValueError(f"{other} and {name} share one weight that holds zeros: a mask would untie them")
    for name in found:
        if not name:
            raise ValueError("the model is a single layer: put it into a nn.Sequential, so that it can be replaced")
        replace_module(model, name, _masked(model.get_submodule(name)))
    return found


def _holds_zeros(module: nn.Module) -> bool:
    if type(module) not in (nn.Conv2d, nn.Linear, Conv2dSame):
        return False
    weight: Any = module.weight
    return 0 < int((weight == 0).sum()) < weight.numel()


def _masked(layer: Any) -> nn.Module:
    """The layer under the mask of its zeros, with the very parameters that it has."""
    kind = sparse_kind(layer)
    mask = layer.weight.detach() != 0
    made: Any = kind(**arguments(layer, device="meta"), sparsity=1 - int(mask.sum()) / mask.numel())
    made.register_buffer("mask", mask, persistent=False)
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)
