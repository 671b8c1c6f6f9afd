"""Trained networks made reversible: which of their blocks can be, and the stages that run them so.

``revnets.reversible(model)`` is ``reversible`` of this room. The op itself, ``Leapfrog``, is the engine's; blocks are
any, and nothing here knows a network by its name.
"""

from .convert import Report, reversible
from .stage import ReversibleStage

__all__ = ["Report", "ReversibleStage", "reversible"]
