"""Sparse layers for ``conv_cfg=dict(type="SparseDopedConv2d", sparsity=0.75)`` in any MMDetection model."""

from __future__ import annotations

from .. import layers

CONV_LAYERS = {
    "SparseParallelConv2d": layers.SparseParallelConv2d,
    "SparseFactorizedConv2d": layers.SparseFactorizedConv2d,
    "SparseDopedConv2d": layers.SparseDopedConv2d,
    "SparseMaskedConv2d": layers.SparseConv2d,  # mmcv.ops has a SparseConv2d, for point clouds
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
