"""``sparse_doped``: a dense low-rank path beside one sparse layer of full size, summed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...sparsity.masks import check_sparsity
from ..fold import folded_layer, plain_layer
from ..geometry import Compound, arguments, described, factors, fans
from ..lean.conv import conv
from ..sites import Unsuitable
from .sparse import sparse_kind


def low_rank(layer: nn.Module, sparsity: float) -> int:
    r"""Rank of the dense path, per group: :math:`r = \lfloor s k^2 C_i C_o / (k^2 C_i + C_o) \rfloor`.

    Example:
        >>> low_rank(nn.Conv2d(64, 64, 3), 0.75), low_rank(nn.Linear(384, 384), 0.5)
        (43, 96)
    """
    first, second = fans(layer)
    return math.floor(check_sparsity(sparsity) * first * second / (first + second) + 1e-9)


class _Doped(Compound):
    u: nn.Module
    v: nn.Module
    sparse: nn.Module

    def __init__(self, *args: Any, sparsity: float, init_scale: bool = False, **kwargs: Any) -> None:
        super().__init__()
        layer, factory = self._stand_for(args, kwargs, sparsity)
        rank = low_rank(layer, sparsity)
        if rank < 1:
            first, second = fans(layer)
            raise Unsuitable(
                f"the low-rank path of {described(layer)} would have rank "
                f"{sparsity:g} * {first} * {second} / ({first} + {second}) < 1: use a larger sparsity, or leave it out"
            )
        numel = layer.weight.numel()  # what the low-rank path leaves of them, about 1-s, goes to the sparse layer
        count = numel - rank * sum(fans(layer)) * getattr(layer, "groups", 1)
        if count < 1:
            raise Unsuitable(f"the low-rank path of {described(layer)} would leave no sparse weights: leave it out")
        low = [{**kwargs, "device": None, **factory, "bias": False} for kwargs in factors(layer, rank)]
        self.u, self.v = (self.kind(**kwargs) for kwargs in low)
        options = {"sparsity": 1 - count / numel, "count": count, "init_scale": init_scale}
        self.sparse = sparse_kind(layer)(**{**arguments(layer), "device": None, **factory}, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The low-rank path starts as wide as a dense layer by Kaiming's fan-out: gain 1 in U, sqrt(2) in V."""
        for part, gain in ((self.u, 1.0), (self.v, 2.0)):
            weight: Any = part.weight
            fan_out = weight.shape[0] * weight[0, 0].numel() / getattr(part, "groups", 1)
            weight.normal_(0, (gain / fan_out) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, C_in, H, W)`` or ``(..., in_features)``. Returns: the dense layer's shape."""
        return conv(conv(x, self.u), self.v) + conv(x, self.sparse)


class SparseDopedConv2d(_Doped):
    r"""Sparse iso-FLOP convolution beside a dense low-rank path (Sparse-IFT, arXiv 2303.11525).

    .. math:: y = V * (U * x) + (\theta \odot m) * x, \qquad r = \lfloor s k^2 C_i C_o / (k^2 C_i + C_o) \rfloor

    with U k x k, V 1 x 1 and r channels in between. The three weights together are as many as the dense layer has.

    Args:
        args: those of ``nn.Conv2d``, in its order.
        sparsity: share s of zeros in the sparse layer, in [0, 1), large enough for a rank of 1.
        init_scale: start with sparse weights larger by ``1 / sqrt(1 - s)``.
        kwargs: those of ``nn.Conv2d``.

    Raises:
        ValueError: for a sparsity outside [0, 1), or one that leaves no rank.

    Example:
        >>> SparseDopedConv2d(8, 16, 3, padding=1, sparsity=0.75)(torch.ones(2, 8, 6, 6)).shape
        torch.Size([2, 16, 6, 6])
    """

    kind = nn.Conv2d


class SparseDopedLinear(_Doped):
    r"""Sparse iso-FLOP linear layer beside a dense low-rank path; see ``SparseDopedConv2d``.

    Args:
        args: those of ``nn.Linear``, in its order.
        sparsity: share s of zeros in the sparse layer, in [0, 1), large enough for a rank of 1.
        init_scale: start with sparse weights larger by ``1 / sqrt(1 - s)``.
        kwargs: those of ``nn.Linear``.

    Raises:
        ValueError: for a sparsity outside [0, 1), or one that leaves no rank.

    Example:
        >>> SparseDopedLinear(8, 16, sparsity=0.75)(torch.ones(2, 5, 8)).shape
        torch.Size([2, 5, 16])
    """

    kind = nn.Linear


@folded_layer.register(SparseDopedConv2d)
@folded_layer.register(SparseDopedLinear)
def _folded(layer: Any) -> nn.Module:
    """One dense layer: the low-rank path is part of the weight."""
    full = layer.sparse
    return plain_layer(full, full.weight + low_rank_weight(layer.u, layer.v), full.bias)


@torch.no_grad()
def low_rank_weight(u: Any, v: Any) -> Tensor:
    """The weight of two layers in a row without anything between, the second pointwise: V times U, per group."""
    groups = getattr(u, "groups", 1)
    first = u.weight.reshape(groups, -1, u.weight[0].numel())
    second = v.weight.reshape(groups, -1, first.shape[1])
    return (second @ first).reshape(-1, *u.weight.shape[1:])
