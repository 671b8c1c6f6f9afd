"""Trained, pruned networks as files that run faster: exported, verified against the model, compared, quantised.

A kernel of our own for sparse convolutions (``kernel``, ``lower``) and the engines that others keep (``engines``);
pruning lives in ``revnets.pruning``. Nothing here is imported by ``import revnets``.
"""

from ..kernels.build import KernelUnavailable, kernel_problem, kernel_target
from .candidates import Candidate, Deployed
from .compare import Measurement, compare, compare_layers
from .engines import ENGINES, Engine, deploy, load
from .graph import ExportError, export_graph
from .lower import Layer, lower
from .precisions import Precisions
from .quantize import accuracy, quantize
from .seal import Untrusted

__all__ = [
    "ENGINES",
    "Candidate",
    "Deployed",
    "Engine",
    "ExportError",
    "KernelUnavailable",
    "Layer",
    "Measurement",
    "Precisions",
    "Untrusted",
    "accuracy",
    "compare",
    "compare_layers",
    "deploy",
    "export_graph",
    "kernel_problem",
    "kernel_target",
    "load",
    "lower",
    "quantize",
]
