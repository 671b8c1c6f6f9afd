"""Which results stay although they could be computed again: the costliest, up to a share of what plain training keeps.

All that can be dropped would be too much for networks of cheap convolutions: their norms and activations are a large
part of a step. So a pass on tensors without memory lists what can be dropped, with its cost, and what costs most per
byte stays, as long as the share is not passed. A result is named by its operator and a number, ``silu`` 3: the fourth
result of ``silu`` that autograd asks to keep and that could be dropped. The names do not depend on batch, size, layout
and precision. In a pass that takes another way (frozen parts, another size of image where the network looks at it)
other results stay: bytes and time differ, values do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

SHARE = 0.5
"""Of plain training's bytes: what is kept up to this, rather than computed again, when nothing else is said."""

CALL = 32 * 1024
"""Bytes per image that an operator could read and write in the time that it takes to start it, at eight images."""

Plan = Mapping[str, frozenset[int]]
"""Operators' names, and which of their results stay."""


class Candidate(NamedTuple):
    """A result that can be dropped.

    Attributes:
        op: operator that made it.
        place: how many results of this operator were candidates before it.
        nbytes: freed by dropping it.
        work: bytes that are written to compute it again, each as often as its operator is slower than a copy.
        calls: operators that are run for it.
    """

    op: str
    place: int
    nbytes: int
    work: float
    calls: int

    def cost(self, batch_size: int) -> float:
        """Of computing it again, per byte that it frees."""
        return (self.work + self.calls * CALL * batch_size) / self.nbytes


def choose(candidates: Iterable[Candidate], room: float, batch_size: int = 1) -> Plan:
    """The candidates that cost most per byte, as many as fit.

    Args:
        candidates: of one pass.
        room: bytes that they may take.
        batch_size: of the pass.

    Example:
        >>> choose([Candidate("relu", 0, 8, 4.0, 0), Candidate("gelu", 0, 8, 24.0, 0), Candidate("silu", 0, 4, 8.0, 0)], 13)
        {'gelu': frozenset({0}), 'silu': frozenset({0})}
    """
    chosen: dict[str, set[int]] = defaultdict(set)
    for one in sorted(candidates, key=lambda one: (-one.cost(batch_size), -one.nbytes)):
        if one.nbytes <= room:
            room -= one.nbytes
            chosen[one.op].add(one.place)
    return {op: frozenset(places) for op, places in chosen.items()}
