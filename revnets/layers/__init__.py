"""Building blocks of networks: norm-activation pairs and squeeze-and-excite that keep one tensor, MBConv.

Layers know of the reversible engine only ``once`` (statistics computed once per step), and nothing of models or mmdet.
"""

from .mbconv import MBConv
from .norm_act import norm_act
from .squeeze_excite import norm_act_se

__all__ = ["MBConv", "norm_act", "norm_act_se"]
