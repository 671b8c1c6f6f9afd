"""Lean layers: norms, activations and convolutions that keep one tensor for the backward pass, where torch keeps more.

``norm_act``, ``norm_act_conv``, ``conv`` and ``mbconv`` are what networks call. Below them are the operators (``ops``)
and their Triton kernels: one operator per step of a layer, on CUDA one or two kernels of our own.
"""
