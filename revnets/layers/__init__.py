"""Layers: the registry and conversion of networks, sparse iso-FLOP members, munit scaling and FP8, lean norms, MBConv.

Layers know of the reversible engine only ``once`` (statistics computed once per step), and nothing of models or mmdet.
"""

from . import mus_convert, parallel, plain, wide
from .accounting import LayerCost, ModelCost, count_costs
from .compact import load_sparse, save_sparse
from .conv import conv
from .convert import ConversionReport, convert
from .doped import SparseDopedConv2d, SparseDopedLinear
from .factorized import SparseFactorizedConv2d, SparseFactorizedLinear
from .fold import fold
from .fp8 import fp8_products, quantize
from .mbconv import MBConv
from .mus import MuSConv2d, MuSLinear, SparseMuSConv2d, SparseMuSLinear
from .mus_functional import gradient_scale, munit_scale, mus_conv2d, mus_linear
from .mus_optim import mus_param_groups
from .norm_act import lean_layers, norm_act
from .norm_act_conv import norm_act_conv
from .parallel import SparseParallelConv2d, SparseParallelLinear
from .registry import LayerConfig, SparseConfig, list_layers, parse_layers, register_layer
from .sites import Site, Unsuitable
from .sparse import SparseConv2d, SparseLinear, use_sparse_kernel

__all__ = [
    "ConversionReport",
    "LayerConfig",
    "LayerCost",
    "MBConv",
    "ModelCost",
    "MuSConv2d",
    "MuSLinear",
    "Site",
    "SparseConfig",
    "SparseConv2d",
    "SparseDopedConv2d",
    "SparseDopedLinear",
    "SparseFactorizedConv2d",
    "SparseFactorizedLinear",
    "SparseLinear",
    "SparseMuSConv2d",
    "SparseMuSLinear",
    "SparseParallelConv2d",
    "SparseParallelLinear",
    "Unsuitable",
    "conv",
    "convert",
    "count_costs",
    "fold",
    "fp8_products",
    "gradient_scale",
    "lean_layers",
    "list_layers",
    "load_sparse",
    "munit_scale",
    "mus_conv2d",
    "mus_convert",
    "mus_linear",
    "mus_param_groups",
    "norm_act",
    "norm_act_conv",
    "parallel",
    "parse_layers",
    "plain",
    "quantize",
    "register_layer",
    "save_sparse",
    "use_sparse_kernel",
    "wide",
]
