"""Munit-scaled layers and FP8: static scales in place of measured ones, products in FP8 or emulated.

``convert`` registers ``mus`` and ``mus_fp8``; ``layers`` are the modules, ``functional`` their arithmetic, ``optim``
the rules of transfer; ``fp8`` and ``fp8_conv`` choose who multiplies. Triton is imported late, at the first product.
"""
