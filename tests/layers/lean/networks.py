"""Small networks of plain torch with what real ones do: in place, functional, shared, normalised, attended, dropped."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 8
"""Channels of all of them: ``(N, C, 16, 16)`` in and out."""


class Bottleneck(nn.Module):
    """Three convolutions with norms, activations in place, and a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(C, C, k, padding=k // 2, bias=False) for k in (1, 3, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            x = self.act(x) if place < 2 else x
        x += shortcut
        return self.act(x)


class Gated(nn.Module):
    """Squeeze-and-excite between two convolutions; an activation in place of which autograd keeps a copy."""

    def __init__(self, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.expand, self.norm, self.act = nn.Conv2d(C, 4 * C, 1), nn.BatchNorm2d(4 * C), act(inplace=True)
        self.gate = nn.Conv2d(4 * C, 4 * C, 1)
        self.project = nn.Conv2d(4 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.expand(x)))
        h = h * F.hardsigmoid(self.gate(h.mean((2, 3), keepdim=True)))
        return x + self.project(h)


class Mlp(nn.Module):
    """Layer norm, linear layers and dropout on tokens."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.act, self.drop, self.scale = nn.GELU(), nn.Dropout(p), nn.Parameter(torch.full((C,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        tokens = self.drop(self.down(self.drop(self.act(self.up(self.norm(tokens))))))
        return x + (self.scale * tokens).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Attention by hand: views of one product, a scaled query, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(2, C), nn.Conv2d(C, 3 * C, 1), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        weights = ((q * C**-0.5) @ k.transpose(1, 2)).softmax(-1)
        return x + self.out(weights @ v).transpose(1, 2).reshape(x.shape)


class Scales(nn.Module):
    """Pooling, upsampling, a sum of both, and their concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.low, self.out = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(2 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        low = F.hardswish(self.low(F.max_pool2d(x, 3, 2, 1)))
        both = F.relu(x + F.interpolate(low, scale_factor=2.0, mode="nearest"))
        return self.out(torch.cat([F.pad(both, (1, 0, 0, 0))[..., :-1], x.roll(1, -1)], 1))


class Standardised(nn.Module):
    """A weight that is normalised anew in each pass, by batch norm's function, and a swish by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = F.batch_norm(weight.reshape(1, C, -1), None, None, training=True).reshape_as(weight)
        y = F.conv2d(x, weight, self.conv.bias, padding=1)
        y = F.instance_norm(y)
        return self.head(y * y.sigmoid() + y.clamp(-1, 1).square())


class Frozen(nn.Module):
    """A batch norm in evaluation, as in detectors, with a sum of one tensor with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm(self.first(x)), 0.1)
        return self.second(y + y) + self.second(y.abs())


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": Bottleneck,
    "gated": Gated,
    "gated by hardswish": lambda: Gated(nn.Hardswish),
    "mlp": Mlp,
    "dropout": lambda: Mlp(0.3),
    "attention": Attention,
    "scales": Scales,
    "standardised": Standardised,
    "frozen norm": Frozen,
}


def network(*names: str, seed: int = 0) -> nn.Module:
    """Blocks in a row, every parameter away from its start value, in float64."""
    torch.manual_seed(seed)
    model: Any = nn.Sequential(*(BLOCKS[name]() for name in names)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.train()


def images(n: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch for them."""
    return torch.randn(n, C, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
