"""Small networks of timm's families, with stages to be made reversible, and the size of their images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

Make = Callable[..., nn.Module]


def _timm(name: str, **sizes: Any) -> Make:
    return lambda **more: timm.create_model(name, num_classes=5, **{**sizes, **more})


def _mixer(**more: Any) -> nn.Module:
    return MlpMixer(num_classes=5, img_size=64, embed_dim=32, num_blocks=3, **more)


def _metaformer(**more: Any) -> nn.Module:
    return MetaFormer(num_classes=5, depths=(2, 2, 1, 1), dims=(8, 16, 16, 16), **more)


NETWORKS: dict[str, tuple[Make, int]] = {
    "resnet": (_timm("test_resnet", layers=(2, 3, 2, 2), channels=(8, 16, 16, 16)), 64),
    "convnext": (_timm("test_convnext"), 64),
    "vit": (_timm("test_vit", img_size=64), 64),
    "mixer": (_mixer, 64),
    "mobilenet": (_timm("mobilenetv3_small_050"), 64),
    "swin": (
        _timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
        56,
    ),
    "metaformer": (_metaformer, 64),
}


def made(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """A network in training, with weights that are not at rest, and images for it."""
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    model = make(**options).train()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1 and ("gamma" in key or "layer_scale" in key or key.endswith("ls.gamma")):
                p.fill_(0.5)  # nearly nothing in a network that was never trained
    return model, torch.randn(2, 3, size, size)


def loss(y: Tensor) -> Tensor:
    """That minds every output."""
    return (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + y.float().square().mean()
