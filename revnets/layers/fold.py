"""Converted networks back to torch's own layers: zeros baked in, what is linear merged."""

from __future__ import annotations

import copy
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from .convert import replace_module
from .geometry import arguments


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
        plain = folded_layer(module)
        if plain is not None:
            folded = replace_module(folded, name, plain.eval())
    return folded


@singledispatch
def folded_layer(module: Any) -> nn.Module | None:
    """Torch's own layer for a converted one, or None where there is none: each family registers its classes.

    Args:
        module: of a copy in eval mode; what it is made of is folded already.
    """
    return None


@torch.no_grad()
def plain_layer(like: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Torch's own layer (or what ``like.plain_kind`` says) with the settings of ``like`` and these numbers."""
    usual = nn.Linear if isinstance(like, nn.Linear) else nn.Conv2d
    made: Any = getattr(like, "plain_kind", usual)(**arguments(like, bias=bias is not None))
    made.weight.copy_(weight)
    if bias is not None and made.bias is not None:
        made.bias.copy_(bias)
    return made
