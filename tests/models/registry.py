"""The registered models of this library, found in timm's registry: a new one is tested from the moment it registers."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets  # noqa: F401 - registers the models

NAMES = tuple(name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("revnets."))
REVBIFPN = tuple(name for name in NAMES if "revbifpn" in name)
TRANSFORMERS = tuple(name for name in NAMES if "mus_vit" in name)
TINY = "test_revbifpn"
TINY_TRANSFORMERS = ("test_mus_vit", "test_rev_mus_vit")
MAX_QUICK_PARAMETERS = 4_000_000


@cache
def meta_model(name: str) -> Any:
    """The model in eval mode without weights: shapes of outputs cost little, at any size. Shared: do not change it."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


def meta_image(name: str) -> Tensor:
    """One image of the model's own size."""
    return torch.empty(1, 3, *meta_model(name).pretrained_cfg["input_size"][1:], device="meta")


@cache
def meta_outputs(name: str) -> tuple[Tensor, list[Tensor]]:
    """Final features and maps of `meta_image(name)`."""
    return meta_model(name).forward_intermediates(meta_image(name))


def parametrize_by_cost() -> pytest.MarkDecorator:
    """Every registered name, the big ones marked slow."""
    return pytest.mark.parametrize(
        "name", [name if _is_quick(name) else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
    )


def _is_quick(name: str) -> bool:
    return sum(p.numel() for p in meta_model(name).parameters()) <= MAX_QUICK_PARAMETERS


def make(name: str, **kwargs: Any) -> Any:
    """The same random weights in every call with the same arguments."""
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(number: int = 2, size: int = 64, in_chans: int = 3) -> Tensor:
    return torch.randn(number, in_chans, size, size, generator=torch.Generator().manual_seed(1))


def own_images(name: str) -> Tensor:
    """Images of the model's own size where it takes no other."""
    cfg = meta_model(name).pretrained_cfg
    return images(size=cfg["input_size"][-1]) if cfg["fixed_input_size"] else images()


def absolute(out_indices: int | Sequence[int]) -> list[int]:
    """What timm means by `out_indices` on four maps: an integer stands for the last ones."""
    return list(range(4 - out_indices, 4)) if isinstance(out_indices, int) else [i % 4 for i in out_indices]


def unpooled_shape(model: Any) -> tuple[int, ...]:
    """Of the final features of one image of the model's own size: a map, or tokens."""
    if model.pretrained_cfg["pool_size"] is not None:
        return (1, model.num_features, *model.pretrained_cfg["pool_size"])
    return (1, model.patch_embed.num_patches + model.num_prefix_tokens, model.num_features)


def with_statistics(model: Any) -> Any:
    """The model in eval mode with random running statistics, as after training, so that no norm is trivial."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def relative(value: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())
