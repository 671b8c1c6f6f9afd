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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SHARE = 0.5
"""Of plain training's bytes: what is kept up to this, rather than computed again, when nothing else is said."""

CALL = 256 * 1024
"""Bytes per image that could be copied in the time that it takes to start an operator again, at eight images.

That is some 100 microseconds: Python's part of it, with caches that the network has filled.
"""


@dataclass(frozen=True)
class Plan:
    """What stays although it could be dropped, by the names of operators.

    Attributes:
        spared: which of their results stay.
        last: the last one that is dropped. After all of these the recorder does nothing any more: the last layers of
            many networks are small, and what they would free is worth less than the recorder's own time.
        reading: the same for recipes that are read from autograd's graph (``reading``), whose results have other
            numbers; None where these keep more.
    """

    spared: Mapping[str, frozenset[int]] = field(default_factory=dict)
    last: Mapping[str, int] = field(default_factory=dict)
    reading: Plan | None = None


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


def choose(candidates: Sequence[Candidate], room: float, batch_size: int = 1) -> Plan:
    """The candidates that cost most per byte, as many as fit.

    Args:
        candidates: of one pass.
        room: bytes that they may take.
        batch_size: of the pass.

    Example:
        >>> results = [Candidate("relu", 0, 80, 40.0, 0), Candidate("relu", 1, 8, 4.0, 0)]
        >>> choose([*results, Candidate("silu", 0, 4, 8.0, 0)], 13)
        Plan(spared={'silu': frozenset({0}), 'relu': frozenset({1})}, last={'relu': 0}, reading=None)
    """
    spared: dict[str, set[int]] = defaultdict(set)
    for one in sorted(candidates, key=lambda one: (-one.cost(batch_size), -one.nbytes)):
        if one.nbytes <= room:
            room -= one.nbytes
            spared[one.op].add(one.place)
    last = {one.op: one.place for one in candidates if one.place not in spared.get(one.op, ())}
    return Plan({op: frozenset(places) for op, places in spared.items()}, last)
