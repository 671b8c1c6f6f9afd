"""Small networks of many kinds, by name."""

from typing import Any

import timm
import torch
from torch import Tensor, nn


class Lists(nn.Module):
    """Blocks that take a list and change it, as HRNet's do, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(ListBlock() for _ in range(4)))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.head(torch.cat(self.blocks([x, x + 1]), 1).mean((2, 3)))


class ListBlock(nn.Module):
    """Two branches on a list of two."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(True), nn.Dropout(0.2),
                          nn.Conv2d(32, 16, 1)) for _ in range(2)
        )  # fmt: skip

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        for k, branch in enumerate(self.branches):
            xs[k] = xs[k] + branch(xs[k])
        return xs


def _flat() -> nn.Module:
    """Single layers in a row, activations in place."""
    layers: list[nn.Module] = []
    for width in (16, 32, 32, 32, 32):
        layers += [nn.LazyConv2d(width, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(2, 3, 32, 32))
    return model


NETWORKS = {
    "test_resnet": (3, 64, 64),
    "test_vit": (3, 160, 160),
    "test_efficientnet": (3, 64, 64),
    "test_convnext": (3, 64, 64),
    "flat": (3, 32, 32),
    "lists": (3, 32, 32),
    "test_revbifpn": (3, 64, 64),
}
"""Size of one image."""


def make(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network in training, always with the same weights, and the size of its images."""
    torch.manual_seed(0)
    own = {"flat": _flat, "lists": Lists}
    model = own[name]() if name in own else timm.create_model(name, num_classes=10)
    return model.train(), NETWORKS[name]
