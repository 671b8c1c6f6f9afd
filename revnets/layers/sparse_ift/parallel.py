"""``sparse_parallel``: several sparse branches, each with its own norm and activation, summed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...sparsity.masks import check_sparsity
from ..geometry import ActLayer, NormLayer, Usual, WithNorms, arguments
from ..lean.conv import conv
from ..lean.norm_act import norm_act
from ..registry import SparseConfig, register_layer
from ..sites import Site
from .sparse import sparse_kind


def num_branches(sparsity: float) -> int:
    """``round(1 / (1 - s))``.

    Example:
        >>> [num_branches(s) for s in (0, 0.5, 0.75, 0.9)]
        [1, 2, 4, 10]
    """
    return max(1, round(1 / (1 - check_sparsity(sparsity))))


class Branch(nn.Module):
    """A layer, then a norm and an activation, where it has them."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None, act: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.norm, self.act = layer, norm, act

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, C_in, H, W)`` or ``(..., in_features)``."""
        x = conv(x, self.layer)
        if self.norm is not None:
            return norm_act(x, self.norm, self.act)
        return x if self.act is None else self.act(x)


class _Parallel(WithNorms):
    branches: nn.ModuleList

    def __init__(
        self,
        *args: Any,
        sparsity: float,
        norm_layer: NormLayer | Usual | None = "usual",
        act_layer: ActLayer | Usual | None = "usual",
        init_scale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        layer, factory = self._stand_for(args, kwargs, sparsity)
        numel, width = layer.weight.numel(), layer.weight.shape[0]  # shared out evenly: as many FLOPs to the last one
        count = min(num_branches(sparsity), numel)
        self.branches = nn.ModuleList()
        for index in range(count):
            kept = numel // count + (index < numel % count)
            options = {"sparsity": 1 - kept / numel, "count": kept, "init_scale": init_scale}
            made = sparse_kind(layer)(**{**arguments(layer), "device": None, **factory, **options})
            self.branches.append(Branch(made, self._norm(norm_layer, width, factory), self._act(act_layer)))
        if norm_layer is None and act_layer is None:
            self.note = "neither norm nor activation follows: the sum of its branches is linear"

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, C_in, H, W)`` or ``(..., in_features)``. Returns: the dense layer's shape."""
        first, *others = self.branches
        total = first(x)
        for branch in others:
            total = total + branch(x)
        return total


class SparseParallelConv2d(_Parallel):
    r"""Sparse iso-FLOP convolution of parallel branches (Sparse-IFT, arXiv 2303.11525).

    .. math:: y = \sum_{b=1}^{B} \sigma(\mathrm{norm}_b((\theta_b \odot m_b) * x)), \qquad B = \mathrm{round}(1/(1-s))

    The masks together keep as many weights as the dense layer has.

    Args:
        args: those of ``nn.Conv2d``, in its order.
        sparsity: share s of zeros in each branch, in [0, 1).
        norm_layer: makes the norm of a branch, given its channels; None for none; by default batch norm.
        act_layer: makes the activation of a branch; None for none; by default ReLU.
        init_scale: start with weights larger by ``1 / sqrt(1 - s)``.
        kwargs: those of ``nn.Conv2d``.

    Raises:
        ValueError: for a sparsity outside [0, 1).

    Example:
        >>> layer = SparseParallelConv2d(8, 16, 3, padding=1, sparsity=0.75)
        >>> len(layer.branches), layer(torch.ones(2, 8, 6, 6)).shape
        (4, torch.Size([2, 16, 6, 6]))
    """

    kind, usual_norm, usual_act = nn.Conv2d, nn.BatchNorm2d, nn.ReLU


class SparseParallelLinear(_Parallel):
    r"""Sparse iso-FLOP linear layer of parallel branches; see ``SparseParallelConv2d``.

    Args:
        args: those of ``nn.Linear``, in its order.
        sparsity: share s of zeros in each branch, in [0, 1).
        norm_layer: makes the norm of a branch, given its features; None for none; by default layer norm.
        act_layer: makes the activation of a branch; None for none; by default GELU.
        init_scale: start with weights larger by ``1 / sqrt(1 - s)``.
        kwargs: those of ``nn.Linear``.

    Raises:
        ValueError: for a sparsity outside [0, 1).

    Example:
        >>> SparseParallelLinear(8, 16, sparsity=0.5)(torch.ones(2, 5, 8)).shape
        torch.Size([2, 5, 16])
    """

    kind, usual_norm, usual_act = nn.Linear, nn.LayerNorm, nn.GELU


@dataclass(frozen=True)
class SparseParallelConfig(SparseConfig):
    """Options of ``sparse_parallel``.

    Args:
        norm_only: branches take over the norm that follows the layer, and leave the activation to their sum.
    """

    norm_only: bool = False


@register_layer("sparse_parallel", SparseParallelConfig)
def sparse_parallel(site: Site, config: SparseParallelConfig) -> nn.Module:
    """Branches at density 1-s, each with the norm and activation that follow the layer, summed (Sparse-IFT)."""
    norm = site.take_norm()
    act = None if config.norm_only else site.take_act()
    kind = SparseParallelConv2d if isinstance(site.layer, nn.Conv2d) else SparseParallelLinear
    return kind(
        **arguments(site.layer),
        sparsity=config.sparsity,
        norm_layer=None if norm is None else lambda _: copy.deepcopy(norm),
        act_layer=None if act is None else lambda: copy.deepcopy(act),
        init_scale=config.init_scale,
    )
