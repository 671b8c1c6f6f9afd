"""Steps of a plan that become one: gates with the convolution behind them, a sum with the upsampling of a summand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .calls import ConvCall, MapCall, ScaleCall, UpsampleCall, check_gates, check_residual
from .plan import Call, Part, Step
from .shared import Shape


class GatedConvCall:
    """A convolution of planes times gates: ``(N, C, H, W)``, ``(N, C, 1, 1)`` and perhaps a residual."""

    def __init__(self, conv: ConvCall) -> None:
        self._conv = conv

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        check_gates(shapes[1], shapes[0])
        (part,), out = self._conv.parts([shapes[0], *shapes[2:]])
        moved = {name: operand + (operand > 0) for name, operand in part.reads.items()}
        return [Part(part.struct, {**moved, "gates": 1})], out


class UpsampledSumCall:
    """An image upsampled, plus another one, and the activation of the sum."""

    def __init__(self, upsampling: UpsampleCall, total: MapCall) -> None:
        self._upsampling, self._activation = upsampling, total.activation

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        (part,), out = self._upsampling.parts(shapes[:1])
        check_residual(shapes[1], out)
        part.struct.activation = self._activation
        return [Part(part.struct, {**part.reads, "residual": 1})], out


def fuse(steps: Sequence[Step], inputs: int, outputs: Sequence[int]) -> tuple[list[Step], list[int]]:
    """Steps that compute the same in fewer passes over memory, and the numbers that their outputs have now.

    Args:
        steps: of a ``Plan``.
        inputs: how many values are given.
        outputs: numbers of the values that are returned.

    Example:
        >>> steps, outputs = fuse([Step(UpsampleCall((2, 2)), (0,)), Step(MapCall(), (1, 2))], 2, [3])
        >>> [type(step.call).__name__ for step in steps], outputs
        (['UpsampledSumCall'], [2])
    """
    made = dict(enumerate(steps, inputs))
    readers: dict[int, list[tuple[Call, int]]] = {value: [] for value in made if value not in outputs}
    for step in steps:
        for place, value in enumerate(step.reads):
            if value in readers:
                readers[value].append((step.call, place))
    gone = {v for v, found in readers.items() if isinstance(made[v].call, ScaleCall) and _are_gated(found)}
    upsampled = {v for v, found in readers.items() if isinstance(made[v].call, UpsampleCall) and len(found) == 1}
    left: dict[int, Step] = {}
    for value, step in made.items():
        call, reads = step.call, step.reads
        summand = next((v for v in reversed(reads) if v in upsampled), None)
        if isinstance(call, ConvCall) and reads[0] in gone:
            step = Step(GatedConvCall(call), (*made[reads[0]].reads, *reads[1:]))
        elif isinstance(call, MapCall) and len(reads) == 2 and summand is not None:
            other, source = reads[1 - reads.index(summand)], made[summand]
            if isinstance(source.call, UpsampleCall):
                step = Step(UpsampledSumCall(source.call, call), (*source.reads, other))
                gone.add(summand)
        left[value] = step
    kept = [value for value in left if value not in gone]
    number = dict(zip([*range(inputs), *kept], range(inputs + len(kept)), strict=True))
    renumbered = [replace(left[v], reads=tuple(number[r] for r in left[v].reads)) for v in kept]
    return renumbered, [number[v] for v in outputs]


def _are_gated(readers: Sequence[tuple[Call, int]]) -> bool:
    """Whether all that read something are convolutions that can take its gates instead."""
    return bool(readers) and all(isinstance(c, ConvCall) and c.takes_gates and not place for c, place in readers)
