"""Sizes of activations, weights and gradients, layer by layer, and what FP8 would lose of them, in any training loop.

Watches, and never changes what is computed; formats and static scales are those of ``revnets.layers``.
"""

from .monitor import NumericsMonitor
from .report import draw_picture, print_table, write_table
from .stats import TensorStats, tensor_stats

__all__ = ["NumericsMonitor", "TensorStats", "draw_picture", "print_table", "tensor_stats", "write_table"]
