"""Where the values of a plan lie: slices, concatenations and their parts share memory; places are used again."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from .build import COPY, DEPTHWISE, LINEAR, MEAN, CallStruct

ALIGNMENT = 16  # floats of a cache line
Shape = tuple[int, ...]


@dataclass
class Task:
    """A call of the kernel.

    Attributes:
        struct: its numbers.
        values: which value each pointer to pixels is, by field.
        shifts: floats from where a value lies to where the call takes its first row to be, by field.
        step: the layer that it is a part of.
    """

    struct: CallStruct
    values: dict[str, int]
    shifts: dict[str, int] = field(default_factory=dict)
    step: int = 0

    @property
    def strided(self) -> bool:
        """Whether its operands and its output may be some channels of larger ones."""
        return int(self.struct.kind) <= LINEAR


@dataclass
class Places:
    """Where each value lies: the one whose memory it has a share of, and from which of its channels on."""

    views: dict[int, tuple[int, int]] = field(default_factory=dict)

    def of(self, value: int) -> tuple[int, int]:
        """The value that has memory of its own, and the channel of it with which this one begins.

        Example:
            >>> Places({5: (4, 2), 4: (3, 8)}).of(5)
            (3, 10)
        """
        first = 0
        while value in self.views:
            value, more = self.views[value]
            first += more
        return value, first


def share(tasks: Sequence[Task], inputs: int, outputs: Collection[int]) -> tuple[list[Task], Places]:
    """Leave out what needs no call: copies of channels, where one memory does for both, and means of depthwise layers.

    Args:
        tasks: in order; changed.
        inputs: how many values are given.
        outputs: values that are returned, each of which needs memory of its own.
    """
    places = Places()
    strided = {value: True for task in tasks for value in task.values.values()}
    for task in tasks:
        for value in task.values.values():
            strided[value] &= task.strided
    left, makers = [], {task.values["y"]: task for task in tasks if task.struct.kind == DEPTHWISE}
    for task in tasks:
        struct, x, y = task.struct, task.values["x"], task.values["y"]
        if struct.kind == COPY and strided[y] and struct.count == struct.c_out and y not in outputs:  # a slice
            places.views[y] = x, struct.first_in
            continue
        alone = x >= inputs and x not in outputs and x not in places.views
        if struct.kind == COPY and strided[x] and struct.count == struct.c_in and alone:
            places.views[x] = y, struct.first_out  # its maker writes it where the concatenation lies
            continue
        if struct.kind == MEAN and x in makers and "means" not in makers[x].values:
            makers[x].values["means"] = y
            continue
        left.append(task)
    return left, places


def arrange(
    tasks: Sequence[Task], places: Places, floats: Sequence[int], kept: Collection[int]
) -> tuple[dict[int, int], int]:
    """Where the values between tasks lie, in floats, and how many there are: places are used again.

    Args:
        tasks: in order.
        places: which values have memory of their own.
        floats: that each value takes.
        kept: values that lie elsewhere.
    """
    born: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, task in enumerate(tasks):
        for value in task.values.values():
            root = places.of(value)[0]
            born.setdefault(root, number)
            last[root] = number
    offsets: dict[int, int] = {}
    size = 0
    for root in sorted((root for root in born if root not in kept), key=lambda root: born[root]):
        need = -(-floats[root] // ALIGNMENT) * ALIGNMENT
        taken = sorted((offsets[v], offsets[v] + floats[v]) for v in offsets if last[v] >= born[root])
        place = 0
        for begin, end in taken:
            if begin - place >= need:
                break
            place = max(place, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[root] = place
        size = max(size, place + need)
    return offsets, size


def plane(shape: Shape) -> int:
    """Pixels of a channel."""
    return math.prod(shape[2:])
