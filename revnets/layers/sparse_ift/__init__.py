"""Sparse iso-FLOP layers: wide, parallel, factorized and doped members, and the masked layers they are made of.

``members`` registers them; ``sparse`` are the masked layers, ``compact`` their files without zeros; ``widen`` and what
it stands on make networks wider. Masks that move are in `revnets.sparsity`, kernels in `revnets.kernels`.
"""
