"""Small networks for the tests of deployment."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pruned_weight(*shape: int, sparsity: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return torch.where(torch.rand(*shape, generator=generator) < sparsity, 0.0, weight)


class Block(nn.Module):
    """An inverted residual: 1x1, depthwise, 1x1, with the sum, and batch norms that do something."""

    def __init__(self, channels: int, kernel_size: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * channels)
        self.depthwise = nn.Conv2d(
            2 * channels, 2 * channels, kernel_size, padding=kernel_size // 2, groups=2 * channels, bias=False
        )
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.project = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.expand(x)))
        y = self.act(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.project(y))


class Net(nn.Module):
    """A stem, two blocks, a strided 3x3, a classifier; 90% of the weights of ``prunable`` layers are 0."""

    def __init__(self, act: type[nn.Module] = nn.ReLU6, num_classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.Sequential(Block(16, 3, act), Block(16, 5, act))
        self.down = nn.Conv2d(16, 32, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.act = act()
        self.fc = nn.Linear(32, num_classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        for module in [self.down, *(m for b in self.blocks for m in (b.expand, b.project))]:  # type: ignore[attr-defined]
            module.weight.data.copy_(pruned_weight(*module.weight.shape, sparsity=0.9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = self.act(self.bn(self.down(x)))
        return self.fc(x.mean((2, 3)))


class Odd(nn.Module):
    """What must not be fused: a broadcast sum, an in-place change of the input, a result that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))
        for conv in (self.a, self.b, self.c):
            conv.weight.data.copy_(pruned_weight(8, 8, 1, 1, sparsity=0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = F.relu(y) + y  # read twice
        z = self.b(y) + y.mean((2, 3), keepdim=True)  # broadcast
        u = z * 1.0
        v = self.c(u)
        u.relu_()  # after the convolution has read it
        w = v.sigmoid()
        total = w + 0.5
        total += self.a(w)  # no problem: the sum has no other name
        w += self.b(total)  # w is read again
        return F.relu(v + u) + w * total


class Fused(nn.Module):
    """What stands between convolutions: gates, splits, concatenations, sums, pools, upsampling of coarser maps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.pool = nn.Conv2d(3, 16, 3, 2, 1), nn.MaxPool2d(3, 2, 1)
        self.block = Block(8, 3, nn.Hardswish)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.down = nn.Conv2d(8, 8, 7, 4, 3, groups=8)
        self.up = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pool(F.relu(self.stem(x))).split(8, dim=1)
        a = self.block(a) + b
        gate = F.hardsigmoid(self.excite(F.hardswish(self.squeeze(a.mean((2, 3), keepdim=True)))))
        b = torch.cat([a * gate, b], 1)[:, 4:12]
        coarse = self.up(self.down(b))
        return torch.cat([a, F.relu(b + F.interpolate(coarse, scale_factor=4, mode="bilinear"))], 1)


def images(batch: int = 2, size: int = 24, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def evaluated(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (model.eval() if isinstance(model, (Net, Odd, Fused)) else model)(x)
