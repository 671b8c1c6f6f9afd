"""Memory-efficient vision backbones on PyTorch.

Importing this package registers the networks with timm, and nothing heavier: no mmdet, scikit-learn or matplotlib.
"""

import types
from typing import TYPE_CHECKING, Any

from . import models, reversible
from .layers import convert, mus_param_groups, use_sparse_kernel
from .pruning import densify, prune
from .reversible import check_reversibility, compile_branches, set_mode
from .version import __version__

if TYPE_CHECKING:
    from .budget import Plan, fit
    from .training.capture.step import capture_step

__all__ = [
    "Plan",
    "__version__",
    "capture_step",
    "check_reversibility",
    "compile_branches",
    "convert",
    "densify",
    "fit",
    "models",
    "mus_param_groups",
    "prune",
    "reversible",
    "set_mode",
    "use_sparse_kernel",
]


def __getattr__(name: str) -> Any:
    if name == "capture_step":  # what it needs would make the import slower
        from .training.capture.step import capture_step

        return capture_step
    if name in ("Plan", "fit"):
        from . import budget

        return getattr(budget, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Reversible(types.ModuleType):
    """The engine's package, which is called for what it does to a network: `revnets.reversible(model)`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """See ``revnets.retrofit.reversible``."""
        from .retrofit import reversible as retrofitted  # knows the rooms above the engine

        return retrofitted(*args, **options)


reversible.__class__ = _Reversible
