"""Any network within a budget of bytes: what each of its blocks keeps, chosen by an integer program over a traced step.

``fit`` plans and applies; a ``Plan`` is what it found. Bytes come from `revnets.profiling`, lean blocks from
`revnets.layers.lean`. The largest batch that fits a network as it is: ``revnets.profiling.fit``.
"""

from .choices import BudgetError
from .fitting import fit
from .plan import Plan

__all__ = ["BudgetError", "Plan", "fit"]
