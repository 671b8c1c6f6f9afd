"""Sparse layers, images for them, and a training step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.kernels.build import kernel_problem
from revnets.layers import SparseConv2d

needs_kernel = pytest.mark.skipif(kernel_problem() is not None, reason=f"no kernel: {kernel_problem()}")


def layer(
    inputs: int = 16, outputs: int = 24, sparsity: float = 0.8, enabled: bool = True, **more: Any
) -> SparseConv2d:
    torch.manual_seed(0)
    made = SparseConv2d(inputs, outputs, 1, sparsity=sparsity, **more)
    made.sparse_kernel = enabled
    return made


def images(n: int = 2, channels: int = 16, side: int = 6) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of all parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[list-item,union-attr]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).detach().abs().max()) <= 2e-5 * max(1.0, float(theirs.detach().abs().max()))
