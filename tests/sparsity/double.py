"""The least that the controller asks of a layer, on plain tensors; and small networks and steps with it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from revnets.sparsity.masks import random_mask


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, layer: MaskedLinear) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.layer = layer
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.layer.gather_dense_grad:
            ctx.layer.dense_grad = grad.clone() if ctx.layer.dense_grad is None else ctx.layer.dense_grad + grad
        return grad * ctx.saved_tensors[0], None, None


class MaskedLinear(nn.Linear):
    """A linear layer with a mask."""

    mask: Tensor

    def __init__(self, in_features: int, out_features: int, sparsity: float) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("mask", random_mask(self.weight.shape, sparsity))
        self.gather_dense_grad = False
        self.dense_grad: Tensor | None = None
        self.set_mask(self.mask)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        self.weight.mul_(self.mask & mask)
        self.mask.copy_(mask)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, _Masked.apply(self.weight, self.mask, self), self.bias)


def network(sparsity: float = 0.75, seed: int = 0, sizes: tuple[int, ...] = (6, 20, 12, 4)) -> nn.Sequential:
    """Linear layers with activations between them, all but the last sparse."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes[:-1]):
        layers += [MaskedLinear(a, b, sparsity), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def batch(step: int, features: int = 6, size: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs and classes that follow from the number of the step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, features, generator=generator)
    return x, (x.sum(1) > 0).long()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Forward, backward, update; the gradients stay, for the controller."""
    optimizer.zero_grad()
    x, y = batch(step)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
