"""Sparse networks and their checkpoints as dense ones: the masks go, the zeros stay and may be trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from ..layers.convert import replace_module
from ..layers.fold import plain_layer
from ..layers.sparse_ift.sparse import SparseConv2d, SparseLinear
from .checkpoint import read_weights

State = Mapping[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)
_MASK = "mask"


@overload
def densify(source: Network) -> Network: ...
@overload
def densify(source: State | str | Path) -> dict[str, Tensor]: ...
def densify(source: nn.Module | State | str | Path) -> Any:
    """A sparse network or checkpoint without its masks, for dense fine-tuning (sparse pre-training, 2303.10464).

    Weights that were masked out start at 0 and are weights like all others. Layers with a mask become torch's own, so
    that what comes out of ``layers="sparse:0.75"`` is the plain network of timm. ``revnets.layers.fold`` also merges
    branches and factors, for inference.

    Args:
        source: a network, which stays as it is; or a state dict; or the path of a checkpoint, of which averaged weights
            (EMA) are preferred.

    Returns:
        A network of the same class in the same modes, or a state dict.

    Raises:
        ValueError: for a file that is missing, damaged, or holds more than weights and plain values.

    Example:
        >>> from revnets.layers import SparseLinear
        >>> sparse = nn.Sequential(SparseLinear(8, 8, sparsity=0.75), nn.ReLU())
        >>> dense = densify(sparse)
        >>> type(dense[0]).__name__, int((dense[0].weight == 0).sum())
        ('Linear', 48)
        >>> sorted(densify(sparse.state_dict())) == sorted(dense.state_dict())
        True
    """
    if isinstance(source, nn.Module):
        return _dense_network(source)
    return _dense_state(read_weights(source) if isinstance(source, (str, Path)) else source)


def _dense_network(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    for name, module in list(found.named_modules()):
        if isinstance(module, (SparseConv2d, SparseLinear)):
            plain = plain_layer(module, module.weight * module.mask, module.bias).train(module.training)
            for leaf, parameter in plain.named_parameters():
                parameter.requires_grad_(getattr(module, leaf).requires_grad)
            found = replace_module(found, name, plain)
    return found


def _dense_state(state: State) -> dict[str, Tensor]:
    masks = {name for name in state if _is_mask(state, name)}
    dense = {}
    for name, tensor in state.items():
        mask = state.get(name.removesuffix("weight") + _MASK) if name.rpartition(".")[2] == "weight" else None
        if name not in masks:
            dense[name] = tensor if mask is None or mask.dtype != torch.bool else tensor * mask
    return dense


def _is_mask(state: State, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    weight = state.get(f"{owner}.weight" if owner else "weight")
    mask = state[name]
    return leaf == _MASK and weight is not None and mask.dtype == torch.bool and mask.shape == weight.shape
