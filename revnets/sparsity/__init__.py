"""Masks of sparse weights and how they change in training: random, Erdos-Renyi; static, SET, RigL.

Sparse layers are recognised by a ``weight`` and a bool buffer ``mask`` of its shape; which layers those are lives in
``revnets.layers``, which this package does not import. Training loops live in ``classification`` and ``revnets.mm``.
"""

from .masks import densities, er, erk, random_mask, uniform

__all__ = ["densities", "er", "erk", "random_mask", "uniform"]
