"""Layers that follow each other in bands of rows, so that what is between them stays in the second cache.

A band of the first layer's output is read by the next layer at once, and so on down the chain; then comes the next
band. Memory for a few rows does for each value between: a pointwise convolution reads the very rows that were just
written, a depthwise one some of the band before, too, so that the rows of its input lie in a ring. Every row is
computed once, from the same numbers as without bands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .build import CONVOLUTION, DEPTHWISE, CallStruct
from .shared import Places, Task

_LARGE = 2**19  # floats between two layers from which on it pays: more than a second cache
_BAND = 3 * 2**15  # floats of a band, at most, in the value with the longest rows


@dataclass
class _Layer:
    """A layer of a chain. Its bands end before rows ``k * step - lag``, for k from 1 on, and at the last one."""

    task: Task
    step: int
    lag: int
    done: int = 0

    @property
    def struct(self) -> CallStruct:
        return self.task.struct


def in_bands(
    tasks: Sequence[Task], places: Places, inputs: int, outputs: Collection[int]
) -> tuple[list[Task], dict[int, int]]:
    """The tasks, chains of them cut into bands, and how many floats the values within the chains take now.

    Args:
        tasks: in order.
        places: which values share memory: those stay whole.
        inputs: how many values are given.
        outputs: values that are returned.
    """
    reads = Counter(value for task in tasks for name, value in task.values.items() if name != "y")
    whole = {*range(inputs), *outputs, *places.views, *(root for root, _ in places.views.values())}
    found: list[Task] = []
    windows: dict[int, int] = {}
    chain: list[Task] = []
    for task in [*tasks, None]:
        if chain and (task is None or not _follows(chain[-1], task, reads, whole)):
            found += _cut(chain, windows)
            chain = []
        if task is not None:
            chain.append(task)
    return found, windows


def _follows(before: Task, task: Task, reads: Counter[int], whole: Collection[int]) -> bool:
    """Whether the value between two tasks can come in bands, and is large enough."""
    value, c = before.values["y"], before.struct
    if value != task.values["x"] or reads[value] > 1 or value in whole or c.c_out * c.h_out * c.w_out < _LARGE:
        return False
    return _has_bands(before) and _has_bands(task) and (task.struct.kind == DEPTHWISE or _is_pointwise(task.struct))


def _has_bands(task: Task) -> bool:
    c = task.struct
    if c.n != 1 or "residual" in task.values or "means" in task.values:
        return False
    if c.kind == DEPTHWISE:
        return c.kh == c.kw and c.stride_h == c.stride_w and c.kh in (3, 5, 7) and c.stride_h <= 2
    return int(c.kind) == CONVOLUTION


def _is_pointwise(c: CallStruct) -> bool:
    return (c.kh, c.kw, c.stride_h, c.stride_w, c.pad_h, c.pad_w) == (1, 1, 1, 1, 0, 0)


def _cut(chain: list[Task], windows: dict[int, int]) -> list[Task]:
    """A chain's tasks band after band; its values' floats are added to the windows."""
    layers = _layers(chain)
    if len(layers) < 2:
        return chain
    bands = _bands(layers)
    rings = [_ring(layers[at], layers[at + 1], bands[at], bands[at + 1]) for at in range(len(layers) - 1)]
    for layer, rows in zip(layers, rings, strict=False):
        windows[layer.task.values["y"]] = layer.struct.c_out * rows * layer.struct.w_out
    numbers = sorted({number for one in bands for number in one})
    return [
        _banded(layers, rings, at, *bands[at][number])
        for number in numbers
        for at in range(len(layers))
        if number in bands[at]
    ]


def _layers(chain: list[Task]) -> list[_Layer]:
    """How the chain is cut; one layer alone where it is not worth it."""
    strides, widest = 1, 1
    for at, task in enumerate(chain):
        strides *= task.struct.stride_h if at else 1
        widest = max(widest, task.struct.c_out * task.struct.w_out // strides)
    step = max(_BAND // widest // strides, 1) * strides
    layers = [_Layer(chain[0], step, 0)]
    if step >= chain[0].struct.h_out:
        return layers
    for task in chain[1:]:
        c, before = task.struct, layers[-1]
        lag = max(0, -((c.pad_h - c.kh - before.lag) // c.stride_h + 1))
        layers.append(_Layer(task, before.step // c.stride_h, lag))
    return layers


def _bands(layers: list[_Layer]) -> list[dict[int, tuple[int, int]]]:
    """Of each layer, the rows of its bands by their number."""
    found: list[dict[int, tuple[int, int]]] = [{} for _ in layers]
    number = 0
    while layers[-1].done < layers[-1].struct.h_out:
        number += 1
        for layer, bands in zip(layers, found, strict=True):
            end = min(layer.struct.h_out, number * layer.step - layer.lag)
            if end > layer.done:
                bands[number] = layer.done, end
                layer.done = end
    return found


def _ring(layer: _Layer, reader: _Layer, made: dict[int, tuple[int, int]], read: dict[int, tuple[int, int]]) -> int:
    """Rows of a layer's output that are kept: those of a band, and what the reader needs of the bands before."""
    c, rows = reader.struct, layer.step
    if c.kind == DEPTHWISE:
        for number, (_, end) in made.items():
            first = next((row for at, (row, _) in sorted(read.items()) if at >= number), c.h_out)
            rows = max(rows, end - max(first * c.stride_h - c.pad_h, 0))
        rows = -(-rows // layer.step) * layer.step
    return int(min(rows, layer.struct.h_out))


def _banded(layers: list[_Layer], rings: list[int], at: int, first: int, end: int) -> Task:
    """A layer's task for some rows."""
    layer = layers[at]
    task = layer.task
    struct = CallStruct.from_buffer_copy(task.struct)
    struct.held = getattr(task.struct, "held", None)
    struct.first_row, struct.end_row = first, end
    shifts: dict[str, int] = {}
    if at:
        rows, before = rings[at - 1], layers[at - 1]
        struct.x_plane = rows * struct.w
        if rows < struct.h and struct.kind == DEPTHWISE:
            struct.ring, struct.ring_first = rows, before.lag
        elif rows < struct.h:
            shifts["x"] = -first * struct.w
    if at < len(rings):
        rows = rings[at]
        struct.y_plane = rows * struct.w_out
        if rows < struct.h_out:
            is_ring = layers[at + 1].struct.kind == DEPTHWISE
            shifts["y"] = ((first + layer.lag) % rows - first if is_ring else -first) * struct.w_out
    return Task(struct, task.values, shifts, task.step)
