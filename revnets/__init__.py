"""Memory-efficient vision backbones on PyTorch.

Importing this package registers the networks with timm, and nothing heavier: no mmdet, scikit-learn or matplotlib. Its
names are loaded when they are first asked for, so that ``revnets --help`` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._with_timm import register_with_timm
from .version import __version__

if TYPE_CHECKING:
    from . import models
    from .layers import convert, mus_param_groups, use_sparse_kernel
    from .pruning import densify, prune
    from .reversible import check_reversibility, compile_branches, set_mode
    from .training.capture.step import capture_step

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
_HOMES = {
    "capture_step": ".training.capture.step",
    "check_reversibility": ".reversible",
    "compile_branches": ".reversible",
    "convert": ".layers",
    "densify": ".pruning",
    "mus_param_groups": ".layers",
    "prune": ".pruning",
    "set_mode": ".reversible",
    "use_sparse_kernel": ".layers",
}
_ROOMS = ("kernels", "layers", "models", "pruning", "reversible", "sparsity", "training")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_timm()
