"""The sparse life cycle of trained networks: one-shot pruning, masks found from zeros, densifying, distillation.

It stands on ``revnets.layers`` (which layers there are) and ``revnets.sparsity`` (masks) and knows no data sets;
training loops live in ``classification``, INT8 and export elsewhere. ``distillation`` is imported where it is used.
"""

from ..sparsity.blocks import BLOCKED
from .choice import DEFAULT_EXCLUDE, RULES
from .densify import densify
from .one_shot import prune
from .report import PrunedLayer, PruningReport
from .solve import METHODS, Pattern
from .zeros import keep_zeros

__all__ = [
    "BLOCKED",
    "DEFAULT_EXCLUDE",
    "METHODS",
    "RULES",
    "Pattern",
    "PrunedLayer",
    "PruningReport",
    "densify",
    "keep_zeros",
    "prune",
]
