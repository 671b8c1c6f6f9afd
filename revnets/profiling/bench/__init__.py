"""``revnets bench``: networks, modes and peers side by side, steps timed or launches counted.

A single network's figures are one folder up, benchmarks of kernels and layers in `revnets.benchmarks`.
"""
