"""Sparse iso-FLOP layers: wide, parallel, factorized and doped members, and the masked layers they are made of.

``sparse`` holds those, ``compact`` their files without zeros; `widen`, `widen_rules` and `widths` make networks wider.
Masks that move are in `revnets.sparsity`, kernels that skip zeros in `revnets.kernels`.
"""
