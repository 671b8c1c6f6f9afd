"""Sparse and munit-scaled convolutions by name in any MMDetection model.

``conv_cfg=dict(type="SparseDopedConv2d", sparsity=0.75)``, ``conv_cfg=dict(type="MuSConv2d", fp8=True)``.
"""

from __future__ import annotations

from ... import layers


class MuSConv2d(layers.MuSConv2d):
    """``revnets.layers.MuSConv2d`` that keeps its weights of variance 1.

    MMEngine's initialisers, meant for plain convolutions, take every class whose direct base is called ``Conv2d``; and
    ``ConvModule`` those without an ``init_weights`` of their own.
    """

    def init_weights(self) -> None:
        """Nothing: the constructor has drawn them."""


class SparseMuSConv2d(layers.SparseMuSConv2d):
    """``revnets.layers.SparseMuSConv2d`` that keeps its weights of variance 1; see ``MuSConv2d``."""

    def init_weights(self) -> None:
        """Nothing: the constructor has drawn them."""


CONV_LAYERS = {
    "SparseParallelConv2d": layers.SparseParallelConv2d,
    "SparseFactorizedConv2d": layers.SparseFactorizedConv2d,
    "SparseDopedConv2d": layers.SparseDopedConv2d,
    "SparseMaskedConv2d": layers.SparseConv2d,  # mmcv.ops has a SparseConv2d, for point clouds
    "SparseMuSConv2d": SparseMuSConv2d,
    "MuSConv2d": MuSConv2d,
}


def register_conv_layers() -> None:
    """Make the drop-in convolutions known to MMEngine's registry (``CONV_LAYERS``), once or more often.

    Example:
        >>> from mmengine.registry import MODELS
        >>> register_conv_layers()
        >>> MODELS.build(dict(type="SparseMaskedConv2d", in_channels=4, out_channels=8, kernel_size=1, sparsity=0.5))
        SparseConv2d(4, 8, kernel_size=(1, 1), stride=(1, 1), sparsity=0.5, weights=16/32)
    """
    from mmengine.registry import MODELS

    for name, kind in CONV_LAYERS.items():
        if name not in MODELS.module_dict:
            MODELS.register_module(name=name, module=kind)
