"""Benchmarks of kernels and layers against their peers: FP8 products, training of sparse layers.

Each measures what the rooms below it make, side by side in interleaved rounds; memory, FLOPs and time of whole steps
are `revnets.profiling`'s, engines are compared where they live, in `revnets.deploy`.
"""
