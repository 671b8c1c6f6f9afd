"""Convolutions and linear layers as matrices, and the second moments of what they read."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

_CHUNK = 1 << 24  # numbers of an unfolded image at a time


def as_matrices(layer: Any, kernel_first: bool = False) -> Tensor:
    """The weight as ``(G, R, D)`` in float64; see ``Moments`` for the order of the D inputs."""
    weight = layer.weight.detach().double()
    if kernel_first and weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1).clone()


def like_weight(matrices: Tensor, layer: Any, kernel_first: bool = False) -> Tensor:
    """The inverse of ``as_matrices``: of the weight's shape and dtype."""
    weight = layer.weight
    if kernel_first and weight.dim() == 4:
        out, channels, *kernel = weight.shape
        return matrices.reshape(out, *kernel, channels).permute(0, 3, 1, 2).to(weight.dtype)
    return matrices.reshape(weight.shape).to(weight.dtype)


class Moments:
    r"""Sums :math:`H = \frac{2}{n} X X^T` over the inputs of a layer; the inputs themselves are not kept.

    Inputs of a convolution are the columns of the unfolded image: kernel, stride, padding and dilation are the
    layer's, and each group has its own ``H``. They run over channels first, then over the kernel, as the weight does;
    with ``kernel_first`` the other way round, so that N:M groups run along the channels.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d``.
        kernel_first: order of the inputs of a convolution.

    Example:
        >>> moments = Moments(nn.Linear(2, 3))
        >>> moments.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> moments.hessian()
        tensor([[[10.,  2.],
                 [ 2.,  4.]]], dtype=torch.float64)
    """

    def __init__(self, layer: nn.Module, kernel_first: bool = False) -> None:
        self.layer: Any = layer
        self.kernel_first = kernel_first
        self.rows = 0
        groups, columns = shape(layer)
        device: Any = self.layer.weight.device
        where = "cpu" if device.type == "mps" else device  # which has no float64
        self._sum = torch.zeros(groups, columns, columns, dtype=torch.float64, device=where)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in one input of the layer, ``(N, C, H, W)`` or ``(..., D)``."""
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(self.layer, nn.Linear):
            self._add(x.reshape(1, -1, x.shape[-1]))
            return
        x = x[None] if x.dim() == 3 else x
        numbers = x[0].numel() * self.layer.weight[0, 0].numel()
        for some in x.split(max(1, _CHUNK // max(numbers, 1))):
            self._add(self._unfolded(some))

    def hessian(self) -> Tensor:
        """``(G, D, D)`` in float64."""
        return self._sum * (2 / max(self.rows, 1))

    def _add(self, x: Tensor) -> None:
        """Args: x: ``(G, n, D)``."""
        self.rows += x.shape[1]
        self._sum += (x.transpose(1, 2) @ x).to(self._sum)

    def _unfolded(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, Conv2dSame):
            x = pad_same(x, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
        elif any(layer._reversed_padding_repeated_twice):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
        columns = columns.unflatten(1, (layer.groups, x.shape[1] // layer.groups, -1))  # (N, G, C/G, k*k, L)
        order = (1, 0, 4, 3, 2) if self.kernel_first else (1, 0, 4, 2, 3)
        return columns.permute(order).flatten(3).flatten(1, 2)


def shape(layer: nn.Module) -> tuple[int, int]:
    """Groups and inputs of a group, ``(G, D)``.

    Example:
        >>> shape(nn.Conv2d(8, 16, 3, groups=2)), shape(nn.Linear(8, 16))
        ((2, 36), (1, 8))
    """
    weight: Any = layer.weight
    return int(getattr(layer, "groups", 1)), weight[0].numel()
