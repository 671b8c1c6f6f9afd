"""Masks of sparse weights and how they change in training: random, Erdos-Renyi; static, SET, RigL.

Sparse layers are recognised by a ``weight`` and a bool buffer ``mask`` of its shape; which layers those are lives in
``revnets.layers``, which this package does not import. Training loops live in ``classification`` and ``revnets.mm``.
"""

from .accounting import run_flops, step_flops
from .blocks import BLOCKED, block_of
from .controller import MaskUpdate, SparsityController
from .found import apply_masks, sparse_layers
from .masks import densities, er, erk, random_mask, uniform
from .schedules import SCHEDULES, Schedule

__all__ = [
    "BLOCKED",
    "SCHEDULES",
    "MaskUpdate",
    "Schedule",
    "SparsityController",
    "apply_masks",
    "block_of",
    "densities",
    "er",
    "erk",
    "random_mask",
    "run_flops",
    "sparse_layers",
    "step_flops",
    "uniform",
]
