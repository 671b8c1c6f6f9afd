"""Converted networks back to torch's own layers: zeros baked in, what is linear merged."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .convert import replace_module
from .geometry import arguments
from .munit.layers import MuSConv2d, MuSLinear
from .sparse_ift.doped import SparseDopedConv2d, SparseDopedLinear
from .sparse_ift.factorized import SparseFactorizedConv2d, SparseFactorizedLinear
from .sparse_ift.parallel import Branch, SparseParallelConv2d, SparseParallelLinear
from .sparse_ift.sparse import SparseConv2d, SparseConv2dSame, SparseLinear


def fold(model: nn.Module) -> nn.Module:
    """A copy of the model, in eval mode, that consists of torch's own layers and computes the same.

    Masks and munit scales are multiplied into the weights; FP8 ends there, the plain layers do not quantise. A doped
    layer becomes one dense layer (of the dense network's FLOPs: its low-rank path is part of the weight). Parallel
    branches without activation become one layer, batch norms included; with activations they stay branches, the only
    modules of this library that are left. A factorised layer becomes an ``nn.Sequential`` of two, with norm and
    activation between.

    Args:
        model: converted by ``revnets.convert``, or with sparse layers of its own.

    Example:
        >>> from revnets.layers import convert
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.ReLU())
        >>> net = convert(net, "sparse_doped:0.75", input_size=(8,)).model.eval()
        >>> plain, x = fold(net), torch.randn(3, 8)
        >>> type(plain[0]).__name__, torch.allclose(plain(x), net(x), atol=1e-6)
        ('Linear', True)
    """
    folded = copy.deepcopy(model).eval()
    # from the inside out: branches are plain when their compound's turn comes
    for name, module in reversed(list(folded.named_modules())):
        plain = _folded(module)
        if plain is not None:
            folded = replace_module(folded, name, plain.eval())
    return folded


def _folded(module: Any) -> nn.Module | None:
    """Torch's own layer for a converted one; None where there is none."""
    if isinstance(module, (SparseConv2d, SparseLinear)):
        return plain_layer(module, module.weight * module.mask, module.bias)
    if isinstance(module, (MuSConv2d, MuSLinear)):
        return plain_layer(module, module.effective_weight(), module.bias)
    if isinstance(module, (SparseDopedConv2d, SparseDopedLinear)):
        full: Any = module.sparse  # plain by now
        return plain_layer(full, full.weight + low_rank_weight(module.u, module.v), full.bias)
    if isinstance(module, (SparseParallelConv2d, SparseParallelLinear)):
        return _merged(list(module.branches))
    if isinstance(module, (SparseFactorizedConv2d, SparseFactorizedLinear)):
        return nn.Sequential(*(part for part in (module.u, module.norm, module.act, module.v) if part is not None))
    return None


@torch.no_grad()
def plain_layer(like: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Torch's own layer (or timm's ``Conv2dSame``) with the settings of ``like`` and these numbers."""
    given = arguments(like, bias=bias is not None)
    made: Any
    if isinstance(like, SparseConv2dSame):
        made = Conv2dSame(**{name: value for name, value in given.items() if name != "padding_mode"})
    else:
        made = (nn.Linear if isinstance(like, nn.Linear) else nn.Conv2d)(**given)
    made.weight.copy_(weight)
    if bias is not None and made.bias is not None:
        made.bias.copy_(bias)
    return made


@torch.no_grad()
def low_rank_weight(u: Any, v: Any) -> Tensor:
    """The weight of two layers in a row without anything between, the second pointwise: V times U, per group."""
    groups = getattr(u, "groups", 1)
    first = u.weight.reshape(groups, -1, u.weight[0].numel())
    second = v.weight.reshape(groups, -1, first.shape[1])
    return (second @ first).reshape(-1, *u.weight.shape[1:])


def _merged(branches: list[Any]) -> nn.Module | None:
    """One layer for branches that are linear in eval mode."""
    layers = [_linear_part(branch) for branch in branches]
    if any(layer is None for layer in layers):
        return None
    weight = torch.stack([layer.weight for layer in layers]).sum(0)
    biases = [layer.bias for layer in layers if layer is not None and layer.bias is not None]
    return plain_layer(layers[0], weight, torch.stack(biases).sum(0) if biases else None)


def _linear_part(branch: Branch) -> Any:
    """The branch as one layer, a batch norm's running statistics folded in; None where it is not linear."""
    if not (branch.act is None or isinstance(branch.act, nn.Identity)):
        return None
    norm: Any = branch.norm
    if norm is None or isinstance(norm, nn.Identity):
        return branch.layer
    inner = getattr(norm, "act", None)
    linear = isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats and isinstance(branch.layer, nn.Conv2d)
    if not linear or not (inner is None or isinstance(inner, nn.Identity)):
        return None
    if norm.weight is None:
        norm = nn.BatchNorm2d(norm.num_features, norm.eps).eval().to(norm.running_mean)
        norm.running_mean, norm.running_var = branch.norm.running_mean, branch.norm.running_var  # type: ignore[union-attr]
    layer: Any = branch.layer
    return fuse_conv_bn_eval(layer, norm)
