"""Layers for the kernel, prepared: one at a time, or many in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .build import ACTIVATIONS, CallStruct, Geometry, load_kernel

CONVOLUTION, DEPTHWISE, MEAN = range(3)  # ``Kind`` of call.h
_WEIGHTS_PER_LINE = 24  # of a chunk: fewer, and the sums between two chunks cost more than they save
_CHUNKS = (128, 256)  # inputs whose pixels fill the first cache, and the most that do no harm
_ALIGNMENT = 16  # floats of a cache line
_KEPT = 8  # sizes of the input for which a plan keeps memory
Shape = tuple[int, ...]


class ConvCall:
    """A layer of the kernel with its weights: ``activation(conv(x) + bias + residual)``.

    Args:
        geometry: of the convolution.
        values: non-zero weights, row after row; of depthwise ones all, ``(C, 1, k, k)``.
        columns: int16, where each is in its flattened row ``(C_in / groups, k, k)``; None for depthwise ones.
        rows: int32, where each output channel's weights begin, and the end; None for depthwise ones.
        bias: ``(C_out,)`` or None.
        activation: one of ``ACTIVATIONS``.
    """

    def __init__(
        self,
        geometry: Geometry,
        values: Tensor,
        columns: Tensor | None,
        rows: Tensor | None,
        bias: Tensor | None,
        activation: str = "none",
    ) -> None:
        self.geometry, self.kind = geometry, DEPTHWISE
        self._chunk = 1
        if columns is not None and rows is not None:
            self.kind = CONVOLUTION
            inputs = geometry.in_channels // geometry.groups * math.prod(geometry.kernel_size)
            self._chunk = chunk_size(inputs, len(values) / max(inputs * geometry.out_channels, 1))
            if self._chunk < inputs:
                values, columns, rows = in_chunks(values, columns, rows, self._chunk, -(-inputs // self._chunk))
        self._kept = [None if t is None else t.contiguous() for t in (values, columns, rows, bias)]
        self._activation = ACTIVATIONS.index(activation)
        self._plans: dict[int, Plan] = {}
        load_kernel()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H_out, W_out)``, both contiguous; float32, on the CPU."""
        operands = [x] if residual is None else [x, residual]
        number = len(operands)
        if number not in self._plans:
            step = Step(self, 0, None if residual is None else 1)
            self._plans[number] = Plan([step], number, [number])
        return self._plans[number](*operands)[0]

    def struct(self, shape: Shape) -> tuple[CallStruct, Shape]:
        """What the kernel is told for an input of this shape, without pointers to pixels, and the output's shape."""
        g, (n, channels, height, width) = self.geometry, shape
        if channels != g.in_channels:
            raise ValueError(f"input of {channels} channels: the convolution expects {g.in_channels}")
        size = g.output_size(height, width)
        pointers = [0 if t is None else t.data_ptr() for t in self._kept]
        numbers = (*g.kernel_size, *g.stride, *g.padding, *g.dilation, g.groups)
        settings = (self._activation, self.kind, self._chunk)
        struct = CallStruct(None, *pointers, None, None, n, channels, height, width, g.out_channels, *size)
        for name, value in zip(_NUMBERS, (*numbers, *settings), strict=True):
            setattr(struct, name, value)
        return struct, (n, g.out_channels, *size)


_NUMBERS = [field[0] for field in CallStruct._fields_[14:]]


class MeanCall:
    """The mean over the pixels, ``(N, C, H, W)`` to ``(N, C, 1, 1)``."""

    def struct(self, shape: Shape) -> tuple[CallStruct, Shape]:
        """See ``ConvCall.struct``."""
        n, channels, height, width = shape
        struct = CallStruct(n=n, c_in=channels, h=height, w=width, c_out=channels, h_out=1, w_out=1, kind=MEAN)
        return struct, (n, channels, 1, 1)


def chunk_size(inputs: int, density: float) -> int:
    """How many inputs are multiplied before the next ones come into the first cache."""
    low, high = _CHUNKS
    if inputs <= low:
        return inputs
    most = min(max(_WEIGHTS_PER_LINE / max(density, 1e-6), low), high)
    return -(-inputs // math.ceil(inputs / most))


def in_chunks(values: Tensor, columns: Tensor, rows: Tensor, size: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed weights chunk after chunk of the inputs, columns counted from the chunk's first."""
    outputs = len(rows) - 1
    row = torch.repeat_interleave(torch.arange(outputs), rows.diff().long(), output_size=len(values))
    chunk = columns.long() // size
    place, order = (chunk * outputs + row).sort(stable=True)
    counts = torch.bincount(place, minlength=number * outputs)
    starts = torch.zeros(number * outputs + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    return values[order], (columns.long() % size)[order].to(torch.int16), starts


@dataclass(frozen=True)
class Step:
    """A layer of a plan, and what it reads: values are numbered, the plan's inputs first, then each step's output."""

    call: ConvCall | MeanCall
    source: int
    residual: int | None = None


@dataclass
class _Ready:
    """A plan for inputs of one shape: its calls, the memory between them."""

    structs: Any
    memory: Tensor
    shapes: list[Shape]


class Plan:
    """Layers in order as one call of the kernel, which wakes its threads once; what is between them is kept.

    Args:
        steps: each reads inputs or what steps before it have computed.
        inputs: how many tensors a call takes.
        outputs: numbers of the values that it returns.
    """

    def __init__(self, steps: Sequence[Step], inputs: int, outputs: Sequence[int]) -> None:
        self._steps, self._inputs, self._outputs = list(steps), inputs, list(outputs)
        self._run = load_kernel().revnets_run
        reads = [(s, name, v) for s, step in enumerate(steps) for name, v in _operands(step)]
        self._inputs_at = [(s, name, v) for s, name, v in reads if v < inputs]
        self._outputs_at = [
            (s, name, place)
            for place, v in enumerate(outputs)
            for s, name in [(v - inputs, "y"), *((s, name) for s, name, read in reads if read == v)]
        ]
        self._free: dict[tuple[Shape, ...], list[_Ready]] = {}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Float32 tensors on the CPU to the values of ``outputs``, contiguous."""
        inputs = tuple(x.contiguous() for x in inputs)
        key = tuple(x.shape for x in inputs)
        free = self._free.get(key)
        if free is None:
            if len(self._free) >= _KEPT:
                self._free.clear()
            free = self._free[key] = []
        try:
            ready = free.pop()  # calls may come from several threads: each has memory of its own
        except IndexError:
            ready = self._prepare(key)
        structs, outputs = ready.structs, [torch.empty(ready.shapes[v]) for v in self._outputs]
        for step, name, value in self._inputs_at:
            setattr(structs[step], name, inputs[value].data_ptr())
        for step, name, place in self._outputs_at:
            setattr(structs[step], name, outputs[place].data_ptr())
        if outputs[0].numel():
            self._run(structs, len(structs), torch.get_num_threads())
        free.append(ready)
        return outputs

    def _prepare(self, key: tuple[Shape, ...]) -> _Ready:
        shapes: list[Shape] = [tuple(shape) for shape in key]
        structs = []
        for step in self._steps:
            struct, shape = step.call.struct(shapes[step.source])
            structs.append(struct)
            shapes.append(shape)
        offsets, size = self._arrange(shapes)
        memory = torch.empty(size + _ALIGNMENT)
        start = -(-memory.data_ptr() // (4 * _ALIGNMENT)) * 4 * _ALIGNMENT
        array = (CallStruct * len(structs))(*structs)
        for s, step in enumerate(self._steps):
            array[s].y = start + 4 * offsets.get(self._inputs + s, 0)
            for name, value in _operands(step):
                setattr(array[s], name, start + 4 * offsets.get(value, 0))
        return _Ready(array, memory, shapes)

    def _arrange(self, shapes: Sequence[Shape]) -> tuple[dict[int, int], int]:
        """Where the values between steps lie, in floats: a place is used again once nobody reads it any more."""
        last_read = {v: s for s, step in enumerate(self._steps) for _, v in _operands(step)}
        offsets: dict[int, int] = {}
        size = 0
        for s in range(len(self._steps)):
            value = self._inputs + s
            if value in self._outputs:
                continue
            need = -(-math.prod(shapes[value]) // _ALIGNMENT) * _ALIGNMENT
            taken = sorted(
                (offsets[v], offsets[v] + math.prod(shapes[v])) for v in offsets if last_read.get(v, -1) >= s
            )
            place = 0
            for begin, end in taken:
                if begin - place >= need:
                    break
                place = max(place, -(-end // _ALIGNMENT) * _ALIGNMENT)
            offsets[value] = place
            size = max(size, place + need)
        return offsets, size


def _operands(step: Step) -> list[tuple[str, int]]:
    """What a step reads: the field of the struct, the number of the value."""
    read = [("x", step.source)]
    return read if step.residual is None else [*read, ("residual", step.residual)]
