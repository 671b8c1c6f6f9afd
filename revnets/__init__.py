"""Memory-efficient vision backbones on PyTorch.

Importing this package registers the networks with timm, and nothing heavier: no mmdet, scikit-learn or matplotlib.
"""

from . import models
from .layers import convert, mus_param_groups, use_sparse_kernel
from .pruning import densify, prune
from .reversible import check_reversibility, compile_branches, set_mode
from .training.capture import capture_step
from .version import __version__

__all__ = [
    "__version__",
    "capture_step",
    "check_reversibility",
    "compile_branches",
    "convert",
    "densify",
    "models",
    "mus_param_groups",
    "prune",
    "set_mode",
    "use_sparse_kernel",
]
