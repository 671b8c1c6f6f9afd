"""``dense`` and ``sparse``: torch's own layers, and the same under a mask (no iso-FLOP: fewer FLOPs at equal size)."""

from __future__ import annotations

import torch
from torch import nn

from .geometry import arguments
from .registry import LayerConfig, SparseConfig, register_layer
from .sites import Site
from .sparse_ift.sparse import sparse_kind


@register_layer("dense", keeps_weights=True)
def dense_layer(site: Site, config: LayerConfig) -> nn.Module:
    """Torch's own layers, as they are."""
    return site.layer


@register_layer("sparse", SparseConfig, keeps_weights=True)
def sparse_layer(site: Site, config: SparseConfig) -> nn.Module:
    """A random mask over the layer's own weights, which stay: (1-s) of the dense FLOPs."""
    layer = site.layer
    made = sparse_kind(layer)(**arguments(layer), sparsity=config.sparsity, init_scale=config.init_scale)
    with torch.no_grad():
        for name, own in layer.named_parameters():
            getattr(made, name).copy_(own)
        made.weight.mul_(made.mask * ((1 - config.sparsity) ** -0.5 if config.init_scale else 1.0))
    return made
