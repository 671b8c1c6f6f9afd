"""Layers: the registry and conversion of networks, sparse iso-FLOP members, lean norm-activation pairs, MBConv.

Layers know of the reversible engine only ``once`` (statistics computed once per step), and nothing of models or mmdet.
"""

from . import parallel, plain, wide
from .accounting import LayerCost, ModelCost, count_costs
from .compact import load_sparse, save_sparse
from .conv import conv
from .convert import ConversionReport, convert
from .doped import SparseDopedConv2d, SparseDopedLinear
from .factorized import SparseFactorizedConv2d, SparseFactorizedLinear
from .fold import fold
from .mbconv import MBConv
from .norm_act import lean_layers, norm_act
from .norm_act_conv import norm_act_conv
from .parallel import SparseParallelConv2d, SparseParallelLinear
from .registry import LayerConfig, SparseConfig, list_layers, parse_layers, register_layer
from .sites import Site, Unsuitable
from .sparse import SparseConv2d, SparseLinear

__all__ = [
    "ConversionReport",
    "LayerConfig",
    "LayerCost",
    "MBConv",
    "ModelCost",
    "Site",
    "SparseConfig",
    "SparseConv2d",
    "SparseDopedConv2d",
    "SparseDopedLinear",
    "SparseFactorizedConv2d",
    "SparseFactorizedLinear",
    "SparseLinear",
    "SparseParallelConv2d",
    "SparseParallelLinear",
    "Unsuitable",
    "conv",
    "convert",
    "count_costs",
    "fold",
    "lean_layers",
    "list_layers",
    "load_sparse",
    "norm_act",
    "norm_act_conv",
    "parallel",
    "parse_layers",
    "plain",
    "register_layer",
    "save_sparse",
    "wide",
]
