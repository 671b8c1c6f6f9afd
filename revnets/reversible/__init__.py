"""The reversible engine: ops, RevSilo, and the autograd node that rebuilds activations instead of keeping them.

It knows nothing of vision models, layers or data: branches are any modules.
"""

from . import cuda as _cuda  # noqa: F401 - its kernels register
from .check import OpError, ReversibilityReport, check_reversibility
from .compiled import compile_branches
from .coupling import AdditiveCoupling
from .errors import RangeError, ReversibleError
from .grid import DEFAULT_GRID_BITS, round_to_grid
from .hooks import every_pass
from .leapfrog import Leapfrog
from .mode import MODES, recompute, set_mode
from .op import ReversibleOp
from .parallel import Parallel
from .replay import Lent, once
from .sequential import RevSequential
from .silo import RevSilo
from .stem import SpaceToDepth
from .update import KeptUpdate

__all__ = [
    "DEFAULT_GRID_BITS",
    "MODES",
    "AdditiveCoupling",
    "KeptUpdate",
    "Leapfrog",
    "Lent",
    "OpError",
    "Parallel",
    "RangeError",
    "RevSequential",
    "RevSilo",
    "ReversibilityReport",
    "ReversibleError",
    "ReversibleOp",
    "SpaceToDepth",
    "check_reversibility",
    "compile_branches",
    "every_pass",
    "once",
    "recompute",
    "round_to_grid",
    "set_mode",
]
