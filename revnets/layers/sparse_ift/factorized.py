"""``sparse_factorized``: two sparse layers in a row, with a norm and an activation between them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ...sparsity.masks import check_sparsity
from ..fold import folded_layer
from ..geometry import ActLayer, NormLayer, Usual, WithNorms, described, factors, fans
from ..lean.conv import conv
from ..lean.norm_act_conv import norm_act_conv
from ..sites import Unsuitable
from .sparse import sparse_kind


def inner_width(layer: nn.Module, sparsity: float) -> int:
    r"""Channels between U and V, per group: :math:`d = \lceil k^2 C_i C_o / ((1-s)(k^2 C_i + C_o)) \rceil`.

    Example:
        >>> inner_width(nn.Conv2d(64, 64, 3), 0.75), inner_width(nn.Linear(384, 384), 0.5)
        (231, 384)
    """
    first, second = fans(layer)
    return math.ceil(first * second / ((1 - check_sparsity(sparsity)) * (first + second)) - 1e-9)


class _Factorized(WithNorms):
    u: nn.Module
    norm: nn.Module | None
    act: nn.Module | None
    v: nn.Module

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
        inner = inner_width(layer, sparsity)
        groups, (first, second) = getattr(layer, "groups", 1), fans(layer)
        sizes = (inner * first * groups, inner * second * groups)
        # both at one density, with as many weights together as the dense layer has: the FLOPs are the same
        kept_first = round(layer.weight.numel() * sizes[0] / sum(sizes))
        counts = (kept_first, layer.weight.numel() - kept_first)
        if min(counts) < 1:
            raise Unsuitable(
                f"the {layer.weight.numel()} weights of {described(layer)} are too few for two factors: leave it out"
            )
        self.u, self.v = (
            sparse_kind(layer)(
                **{**kwargs, "device": None, **factory},
                sparsity=1 - count / size,
                count=count,
                init_scale=init_scale,
            )
            for kwargs, size, count in zip(factors(layer, inner), sizes, counts, strict=True)
        )
        self.norm, self.act = self._norm(norm_layer, inner * groups, factory), self._act(act_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(N, C_in, H, W)`` or ``(..., in_features)``. Returns: the dense layer's shape."""
        x = conv(x, self.u)
        if self.norm is not None and self.act is not None:
            return norm_act_conv(x, self.norm, self.act, None, self.v)
        x = x if self.norm is None else self.norm(x)
        return conv(x if self.act is None else self.act(x), self.v)


class SparseFactorizedConv2d(_Factorized):
    r"""Sparse iso-FLOP convolution in two factors (Sparse-IFT, arXiv 2303.11525): U is k x k, V is 1 x 1.

    .. math:: y = V * \sigma(\mathrm{norm}(U * x)), \qquad d = \lceil k^2 C_i C_o / ((1-s)(k^2 C_i + C_o)) \rceil

    with d channels in between, U and V masked to about 1-s so that they keep as many weights as the dense layer has.
    Groups are factorised one by one.

    Args:
        args: those of ``nn.Conv2d``, in its order.
        sparsity: share s of zeros, in [0, 1).
        norm_layer: makes the norm in between, given its channels; None for none; by default batch norm.
        act_layer: makes the activation in between; None for none; by default ReLU.
        init_scale: start with weights larger by ``1 / sqrt(1 - s)``.
        kwargs: those of ``nn.Conv2d``.

    Raises:
        ValueError: for a sparsity outside [0, 1).

    Example:
        >>> SparseFactorizedConv2d(8, 16, 3, stride=2, padding=1, sparsity=0.75)(torch.ones(2, 8, 6, 6)).shape
        torch.Size([2, 16, 3, 3])
    """

    kind, usual_norm, usual_act = nn.Conv2d, nn.BatchNorm2d, nn.ReLU


class SparseFactorizedLinear(_Factorized):
    r"""Sparse iso-FLOP linear layer in two factors; see ``SparseFactorizedConv2d``.

    Args:
        args: those of ``nn.Linear``, in its order.
        sparsity: share s of zeros, in [0, 1).
        norm_layer: makes the norm in between, given its features; None for none; by default layer norm.
        act_layer: makes the activation in between; None for none; by default GELU.
        init_scale: start with weights larger by ``1 / sqrt(1 - s)``.
        kwargs: those of ``nn.Linear``.

    Raises:
        ValueError: for a sparsity outside [0, 1).

    Example:
        >>> SparseFactorizedLinear(8, 16, sparsity=0.5)(torch.ones(2, 5, 8)).shape
        torch.Size([2, 5, 16])
    """

    kind, usual_norm, usual_act = nn.Linear, nn.LayerNorm, nn.GELU


@folded_layer.register(SparseFactorizedConv2d)
@folded_layer.register(SparseFactorizedLinear)
def _folded(layer: Any) -> nn.Module:
    return nn.Sequential(*(part for part in (layer.u, layer.norm, layer.act, layer.v) if part is not None))
