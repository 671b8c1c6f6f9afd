"""The family's names in the registry: ``sparse``, ``sparse_wide``, ``_parallel``, ``_factorized`` and ``_doped``.

All but ``sparse`` have as many FLOPs as the dense network (Sparse-IFT, arXiv 2303.11525).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..convert import Job
from ..geometry import arguments
from ..registry import MaskConfig, SparseConfig, register_layer
from ..sites import Site
from .doped import SparseDopedConv2d, SparseDopedLinear
from .factorized import SparseFactorizedConv2d, SparseFactorizedLinear
from .parallel import SparseParallelConv2d, SparseParallelLinear
from .sparse import sparse_kind
from .wide import widened


@register_layer("sparse", MaskConfig, keeps_weights=True)
def sparse_layer(site: Site, config: MaskConfig) -> nn.Module:
    """A random mask over the layer's own weights, which stay: (1-s) of the dense FLOPs."""
    layer = site.layer
    options: dict[str, Any] = {"sparsity": config.sparsity, "init_scale": config.init_scale, "pattern": config.pattern}
    made = sparse_kind(layer)(**arguments(layer), **options)
    with torch.no_grad():
        for name, own in layer.named_parameters():
            getattr(made, name).copy_(own)
        made.weight.mul_(made.mask * ((1 - config.sparsity) ** -0.5 if config.init_scale else 1.0))
    return made


@register_layer("sparse_wide", SparseConfig, network=True)
def sparse_wide(job: Job, config: SparseConfig) -> nn.Module:
    """A network sqrt(1/(1-s)) times as wide whose layers are masked to the dense network's FLOPs (Sparse-IFT)."""
    return widened(job, config)


@dataclass(frozen=True)
class SparseParallelConfig(MaskConfig):
    """Options of ``sparse_parallel``.

    Args:
        norm_only: branches take over the norm that follows the layer, and leave the activation to their sum.
    """

    norm_only: bool = False


@register_layer("sparse_parallel", SparseParallelConfig)
def sparse_parallel(site: Site, config: SparseParallelConfig) -> nn.Module:
    """Branches at density 1-s, each with the norm and activation that follow the layer, summed (Sparse-IFT)."""
    norm = site.take_norm()
    act = None if config.norm_only else site.take_act()
    kind = SparseParallelConv2d if isinstance(site.layer, nn.Conv2d) else SparseParallelLinear
    return kind(
        **arguments(site.layer),
        sparsity=config.sparsity,
        norm_layer=None if norm is None else lambda _: copy.deepcopy(norm),
        act_layer=None if act is None else lambda: copy.deepcopy(act),
        init_scale=config.init_scale,
        pattern=config.pattern,
    )


@register_layer("sparse_factorized", SparseConfig)
def sparse_factorized(site: Site, config: SparseConfig) -> nn.Module:
    """Two factors at density 1-s, wider inside than a low rank, norm and activation between them (Sparse-IFT)."""
    kind = SparseFactorizedConv2d if isinstance(site.layer, nn.Conv2d) else SparseFactorizedLinear
    return kind(
        **arguments(site.layer),
        sparsity=config.sparsity,
        norm_layer=site.inner_norm,
        act_layer=lambda: site.inner_act,
        init_scale=config.init_scale,
    )


@register_layer("sparse_doped", SparseConfig)
def sparse_doped(site: Site, config: SparseConfig) -> nn.Module:
    """A dense low-rank path and a full-size layer at density 1-s, summed (Sparse-IFT)."""
    kind = SparseDopedConv2d if isinstance(site.layer, nn.Conv2d) else SparseDopedLinear
    return kind(**arguments(site.layer), sparsity=config.sparsity, init_scale=config.init_scale)
