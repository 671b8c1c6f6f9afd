"""Weights times masks on the kernel: torch's numbers, gradients and layouts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnets
from revnets.kernels import masks
from revnets.kernels.masks import mask_serves, masked, product
from revnets.layers import SparseConv2d, SparseLinear, use_sparse_kernel

from .nets import assert_close, images, needs_kernel, step

pytestmark = [needs_kernel, pytest.mark.usefixtures("_few_weights_too")]
SHAPES = [(1,), (3, 5), (17, 9, 3, 3), (64, 33, 1, 1)]


@pytest.fixture
def _few_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MIN_WEIGHTS", 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_product_and_gradients(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    weight, mask = torch.randn(shape), torch.rand(shape) < 0.5
    if len(shape) == 4:
        weight, mask = (t.contiguous(memory_format=layout) for t in (weight, mask))
    weight.requires_grad_()
    y = masked(weight, mask)
    assert torch.equal(y, weight * mask)
    assert y.stride() == weight.stride()
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, weight, dy)[0], dy * mask)
    (grad,) = torch.autograd.grad(masked(weight, mask).square().sum(), weight, create_graph=True)
    assert torch.equal(torch.autograd.grad(grad.sum(), weight)[0], 2.0 * mask)


def test_numbers_that_are_not_finite_are_torchs() -> None:
    weight = torch.tensor([float("nan"), float("inf"), -1.0, 2.0] * 5)
    mask = torch.tensor([False, False, False, True] * 5)
    torch.testing.assert_close(product(weight, mask), weight * mask, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weight", "mask"),
    [
        (torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool)),
        (torch.ones(2, 3).t(), torch.ones(3, 2, dtype=torch.bool)),
        (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool).t()),
        (torch._neg_view(torch.ones(2, 3)), torch.ones(2, 3, dtype=torch.bool)),
        (torch.ones(4, 2, 3, 3), torch.ones(4, 2, 3, 3, dtype=torch.bool).to(memory_format=torch.channels_last)),
    ],
)
def test_what_is_laid_out_otherwise_is_left_to_torch(weight: Tensor, mask: Tensor) -> None:
    assert not mask_serves(weight, mask)
    with pytest.raises(ValueError, match="laid out alike"):
        product(weight, mask)


def test_few_weights_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert mask_serves(weight, mask)
    monkeypatch.setattr(masks, "MIN_WEIGHTS", 7)
    assert not mask_serves(weight, mask)


def test_other_types_are_left_to_torch() -> None:
    assert not mask_serves(torch.ones(2).double(), torch.ones(2, dtype=torch.bool))
    assert not mask_serves(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"expected torch\.bool"):
        product(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("made", [SparseConv2d(16, 24, 3, sparsity=0.3), SparseLinear(6, 24, sparsity=0.3)])
def test_layers_that_stay_dense(made: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revnets.layers.sparse_ift.sparse, "pays", lambda *args, **more: False)
    seen: list[Any] = []
    monkeypatch.setattr(masks, "product", lambda *args: seen.append(args) or product(*args))
    expected = step(copy.deepcopy(made), images())
    use_sparse_kernel(made)
    assert_close(step(made, images()), expected)
    assert len(seen) == 2  # forwards and backwards
