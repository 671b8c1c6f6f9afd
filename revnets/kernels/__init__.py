"""C++ kernels that skip zeros: compiled at first use (``build``), layers prepared for them (``plan``), torch operators.

They know nothing of networks: `revnets.deploy` puts them into exported graphs, `revnets.layers` into training.
Without a compiler every operator computes the same on torch's dense kernels.
"""

from .build import KernelUnavailable, kernel_problem, kernel_target
from .calls import ConvCall
from .compressed import compress, decompress

__all__ = ["ConvCall", "KernelUnavailable", "compress", "decompress", "kernel_problem", "kernel_target"]
