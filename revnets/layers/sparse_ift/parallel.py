"""``sparse_parallel``: several sparse branches, each with its own norm and activation, summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ...sparsity.masks import check_sparsity
from ..fold import folded_layer, plain_layer
from ..geometry import ActLayer, NormLayer, Usual, WithNorms, arguments
from ..lean.conv import conv
from ..lean.norm_act import norm_act
from .sparse import fitting_block, sparse_kind


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
        pattern: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        layer, factory = self._stand_for(args, kwargs, sparsity)
        block = fitting_block(layer.weight, pattern)
        numel, width = layer.weight.numel(), layer.weight.shape[0]  # shared out evenly: as many FLOPs to the last one
        pieces = numel // block
        count = min(num_branches(sparsity), pieces)
        self.branches = nn.ModuleList()
        for index in range(count):
            kept = block * (pieces // count + (index < pieces % count))
            options = {"sparsity": 1 - kept / numel, "count": kept, "init_scale": init_scale, "pattern": pattern}
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
        pattern: ``4x1``: zeros come in blocks of four input channels; None: single zeros.
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
        pattern: ``4x1``: zeros come in blocks of four input channels; None: single zeros.
        kwargs: those of ``nn.Linear``.

    Raises:
        ValueError: for a sparsity outside [0, 1).

    Example:
        >>> SparseParallelLinear(8, 16, sparsity=0.5)(torch.ones(2, 5, 8)).shape
        torch.Size([2, 5, 16])
    """

    kind, usual_norm, usual_act = nn.Linear, nn.LayerNorm, nn.GELU


@folded_layer.register(SparseParallelConv2d)
@folded_layer.register(SparseParallelLinear)
def _folded(layer: Any) -> nn.Module | None:
    """One layer, where all branches are linear in eval mode."""
    layers = [_linear_part(branch) for branch in layer.branches]
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
