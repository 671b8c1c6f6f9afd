"""``dense``: torch's own layers, as a name like any other."""

from __future__ import annotations

from torch import nn

from .registry import LayerConfig, register_layer
from .sites import Site


@register_layer("dense", keeps_weights=True)
def dense_layer(site: Site, config: LayerConfig) -> nn.Module:
    """Torch's own layers, as they are."""
    return site.layer
