"""Building blocks of networks: norm-activation pairs and squeeze-and-excite that keep one tensor, MBConv.

Layers know of the reversible engine only ``once`` (statistics computed once per step), and nothing of models or mmdet.
"""

from .conv import conv
from .mbconv import MBConv
from .norm_act import lean_layers, norm_act
from .norm_act_conv import norm_act_conv

__all__ = ["MBConv", "conv", "lean_layers", "norm_act", "norm_act_conv"]
