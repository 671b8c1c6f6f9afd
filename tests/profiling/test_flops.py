"""FLOPs against closed forms, depthwise convolutions and recomputation included."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnets.profiling import StepPrediction, predict_training_step


def predict(model: nn.Module, *shape: int) -> StepPrediction:
    return predict_training_step(model, torch.empty(*shape, device="meta").requires_grad_())


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_convolution_forward_and_backward(groups: int) -> None:
    """Both gradients cost what the forward pass costs: also per group, where torch's own formula errs."""
    p = predict(nn.Conv2d(16, 32, 3, padding=1, stride=2, groups=groups), 2, 16, 8, 8)
    macs = 2 * 32 * 4 * 4 * (16 // groups) * 9
    assert p.macs == macs
    assert p.forward_flops == 2 * macs
    assert p.training_flops == 3 * 2 * macs


@pytest.mark.parametrize("groups", [1, 4])
def test_transposed_convolution(groups: int) -> None:
    p = predict(nn.ConvTranspose2d(16, 32, 2, stride=2, groups=groups), 2, 16, 8, 8)
    assert p.macs == 2 * 16 * 8 * 8 * (32 // groups) * 4
    assert p.training_flops == 3 * p.forward_flops


def test_frozen_weights_have_no_gradient_to_compute() -> None:
    model = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    model.weight.requires_grad_(False)
    assert predict(model, 2, 16, 8, 8).training_flops == 2 * 2 * (2 * 16 * 8 * 8 * 9)


def test_linear_and_attention() -> None:
    assert predict(nn.Linear(8, 16), 4, 8).training_flops == 3 * 2 * 4 * 8 * 16

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert predict(Attention(), 2, 4, 10, 8).macs == 2 * (2 * 4 * 10 * 10 * 8)


def test_recomputation_counts() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False)

    p = predict(Part(), 4, 8)
    assert p.training_flops == 4 * p.forward_flops
