"""Layers: the registry, the conversion of networks, what both need to know of one, and a folder per family.

``lean`` layers keep less for the backward pass, ``sparse_ift`` ones skip FLOPs, ``munit`` ones multiply in FP8.
Layers know of the reversible engine only ``once`` (statistics computed once per step), and nothing of models or mmdet.
"""

from . import plain  # noqa: F401  (it registers layers, as the two below do)
from .accounting import LayerCost, ModelCost, count_costs
from .convert import ConversionReport, convert
from .fold import fold
from .lean.conv import conv
from .lean.mbconv import MBConv
from .lean.network import is_lean, make_lean
from .lean.norm_act import lean_layers, norm_act
from .lean.norm_act_conv import norm_act_conv
from .munit import convert as _munit  # noqa: F401
from .munit.fp8 import fp8_products, quantize
from .munit.functional import gradient_scale, munit_scale, mus_conv2d, mus_linear
from .munit.layers import MuSConv2d, MuSLinear, SparseMuSConv2d, SparseMuSLinear
from .munit.optim import mus_param_groups
from .registry import LayerConfig, SparseConfig, list_layers, parse_layers, register_layer
from .sites import Site, Unsuitable
from .sparse_ift import members  # noqa: F401
from .sparse_ift.compact import load_sparse, save_sparse
from .sparse_ift.doped import SparseDopedConv2d, SparseDopedLinear
from .sparse_ift.factorized import SparseFactorizedConv2d, SparseFactorizedLinear
from .sparse_ift.parallel import SparseParallelConv2d, SparseParallelLinear
from .sparse_ift.sparse import SparseConv2d, SparseLinear, use_sparse_kernel

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
    "is_lean",
    "lean_layers",
    "list_layers",
    "load_sparse",
    "make_lean",
    "munit_scale",
    "mus_conv2d",
    "mus_linear",
    "mus_param_groups",
    "norm_act",
    "norm_act_conv",
    "parse_layers",
    "quantize",
    "register_layer",
    "save_sparse",
    "use_sparse_kernel",
]
