"""Layers of the kernel in order: one call for many of them, the memory between them kept."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .bands import in_bands
from .build import CallStruct, load_kernel
from .operands import address, aim, readable
from .shared import ALIGNMENT, Places, Shape, Task, arrange, plane, share

_KEPT = 8  # sizes of the input for which a plan keeps memory


@dataclass(frozen=True)
class Part:
    """One call of the kernel: its numbers, and which operand of the layer each pointer to pixels is."""

    struct: CallStruct
    reads: dict[str, int]


class Call(Protocol):
    """A layer of a plan.

    Its operands and its output are floats ``(N, C, H, W)``; where the attributes ``takes_bytes``, ``gives_bytes`` say
    so, bytes ``(N, C / 4, H, W, 4)`` (see ``byte_blocks``), whose shape is ``(N, C, H, W)`` here.
    """

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """The calls that write the output together, for operands of these shapes, and its shape."""


@dataclass(frozen=True)
class Step:
    """A layer of a plan, and what it reads: values are numbered, the plan's inputs first, then each step's output."""

    call: Call
    reads: tuple[int, ...]


@dataclass
class _Ready:
    """A plan for inputs of one shape: its calls, what they point at (the memory between them, weights), the layers that
    they belong to, the pointers that each run sets."""

    structs: Any
    held: tuple[Tensor, list[CallStruct]]
    layers: list[int]
    shapes: list[Shape]
    inputs_at: list[tuple[int, str, int, int]]
    outputs_at: list[tuple[int, str, int, int]]


def _takes_bytes(call: Call) -> bool:
    return getattr(call, "takes_bytes", False)


def _readable(name: str, x: Tensor, is_bytes: bool) -> Tensor:
    """Contiguous float32 on the CPU, or bytes in fours of channels."""
    if is_bytes:
        if x.dim() != 5 or x.shape[-1] != 4:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: expected bytes (N, C / 4, H, W, 4)")
        return readable(name, x, torch.uint8)
    if x.dtype is not torch.float32 and x.is_cpu and x.is_floating_point() and torch.is_autocast_enabled("cpu"):
        x = x.float()
    return readable(name, x)


class Plan:
    """Layers in order as one call of the kernel, which wakes its threads once; what is between them is kept.

    Args:
        steps: each reads inputs or what steps before it have computed.
        inputs: how many tensors a call takes.
        outputs: numbers of the values that it returns.
        names: of the inputs, for messages; those that have none are called input.
    """

    def __init__(self, steps: Sequence[Step], inputs: int, outputs: Sequence[int], names: Sequence[str] = ()) -> None:
        self._steps, self._inputs, self._outputs = list(steps), inputs, list(outputs)
        self._names = (*names[:inputs], *["input"] * (inputs - len(names)))
        for number, step in enumerate(self._steps):
            if not all(0 <= value < inputs + number for value in step.reads):
                raise ValueError(f"step {number} reads values {step.reads}: expected numbers below {inputs + number}")
        if not all(inputs <= value < inputs + len(self._steps) for value in self._outputs):
            raise ValueError(f"outputs {self._outputs}: expected numbers of what the steps compute")
        if len(set(self._outputs)) < len(self._outputs):
            raise ValueError(f"outputs {self._outputs}: expected each value once")
        self._bytes = self._of_bytes()
        self._run = load_kernel().revnets_run
        self._free: dict[tuple[Shape, ...], list[_Ready]] = {}

    def _of_bytes(self) -> set[int]:
        """Numbers of the values that are bytes."""
        found = {self._inputs + s for s, step in enumerate(self._steps) if getattr(step.call, "gives_bytes", False)}
        found |= {v for step in self._steps for v in step.reads if v < self._inputs and _takes_bytes(step.call)}
        for number, step in enumerate(self._steps):
            if any((v in found) != _takes_bytes(step.call) for v in step.reads):
                kind = "bytes" if _takes_bytes(step.call) else "floats"
                raise ValueError(f"step {number} reads {kind}: values {step.reads} are not, or are both")
        return found

    def __reduce__(self) -> Any:
        return Plan, (self._steps, self._inputs, self._outputs, self._names)  # memory and pointers are this object's

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Float32 tensors on the CPU to the values of ``outputs``, contiguous.

        Under autocast, where layers of torch before them give other types, inputs are converted.

        Raises:
            ValueError: for other tensors, and for sizes that the layers cannot take.
        """
        inputs = self._given(inputs)
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
        outputs = self._point(ready, inputs)
        if any(output.numel() for output in outputs):
            self._run(ready.structs, len(ready.structs), torch.get_num_threads(), None)
        free.append(ready)
        return outputs

    def fixed(self, *inputs: Tensor) -> Callable[[], None]:
        """The plan for these tensors alone, to be timed: nothing is prepared or returned."""
        inputs = self._given(inputs)
        ready = self._prepare(tuple(x.shape for x in inputs))
        kept = (inputs, self._point(ready, inputs))

        def run() -> None:
            self._run(ready.structs, len(ready.structs), torch.get_num_threads() if kept else 0, None)

        return run

    def timed(self, *inputs: Tensor) -> tuple[list[Tensor], list[tuple[CallStruct, float]]]:
        """What a call returns, and the calls of the kernel that it makes with the seconds of each."""
        inputs = self._given(inputs)
        ready = self._prepare(tuple(x.shape for x in inputs))
        outputs, taken = self._point(ready, inputs), (ctypes.c_double * len(ready.structs))()
        self._run(ready.structs, len(ready.structs), torch.get_num_threads(), taken)
        layers: dict[int, tuple[CallStruct, float]] = {}
        for struct, step, seconds in zip(ready.structs, ready.layers, taken, strict=True):
            layers[step] = struct, seconds + layers.get(step, (None, 0.0))[1]
        return outputs, list(layers.values())

    def _given(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(inputs) != self._inputs:
            raise ValueError(f"{len(inputs)} inputs: expected {self._inputs}")
        kinds = [number in self._bytes for number in range(self._inputs)]
        return tuple(map(_readable, self._names, inputs, kinds))

    def _point(self, ready: _Ready, inputs: Sequence[Tensor]) -> list[Tensor]:
        """New outputs; all pointers to them and to the inputs, which the caller holds until the kernel has run."""
        outputs = [self._empty(v, ready.shapes[v]) for v in self._outputs]
        aim(ready.structs, ready.inputs_at, inputs)
        aim(ready.structs, ready.outputs_at, outputs)
        return outputs

    def _empty(self, value: int, shape: Shape) -> Tensor:
        if value not in self._bytes:
            return torch.empty(shape, dtype=torch.float32, device="cpu")
        return torch.empty((shape[0], shape[1] // 4, *shape[2:], 4), dtype=torch.uint8, device="cpu")

    def _prepare(self, key: tuple[Shape, ...]) -> _Ready:
        shapes: list[Shape] = [tuple(shape) for shape in key]
        for v in self._bytes & set(range(self._inputs)):
            shapes[v] = (shapes[v][0], 4 * shapes[v][1], *shapes[v][2:4])
        for name, given in zip(self._names, shapes, strict=True):
            if len(given) != 4 or min(given[2:]) < 1:
                raise ValueError(f"{name} of shape {given}: expected (N, C, H, W), H and W at least 1")
        tasks: list[Task] = []
        for step in self._steps:
            parts, shape = step.call.parts([shapes[v] for v in step.reads])
            for part in parts:
                values = {name: step.reads[operand] for name, operand in part.reads.items()}
                tasks.append(Task(part.struct, {**values, "y": len(shapes)}))
            if min(shape[2:]) < 1:
                raise ValueError(f"input of shape {shapes[0]}: too small, of a layer's output {shape} would be left")
            shapes.append(shape)
        tasks, places = share(tasks, self._inputs, self._outputs)
        for number, task in enumerate(tasks):
            task.step = number
        tasks, windows = in_bands(tasks, places, self._inputs, self._outputs)
        return self._ready(tasks, places, shapes, windows)

    def _ready(self, tasks: list[Task], places: Places, shapes: list[Shape], windows: dict[int, int]) -> _Ready:
        """Memory for the values between the tasks, of some only for `windows` floats, and their pointers to it."""
        floats = [math.prod(shape) // (4 if v in self._bytes else 1) for v, shape in enumerate(shapes)]
        for v, number in windows.items():
            floats[v] = number
        offsets, size = arrange(tasks, places, floats, {*range(self._inputs), *self._outputs})
        memory = torch.empty(size + ALIGNMENT, dtype=torch.float32, device="cpu")
        start = -(-address(memory) // (4 * ALIGNMENT)) * 4 * ALIGNMENT
        array = (CallStruct * len(tasks))(*[task.struct for task in tasks])
        inputs_at, outputs_at = [], []
        for at, task in enumerate(tasks):
            for name, value in task.values.items():
                root, first = places.of(value)
                offset = 4 * (first * plane(shapes[root]) + task.shifts.get(name, 0))
                if root != value:
                    setattr(array[at], f"{name}_image", math.prod(shapes[root][1:]))
                if root < self._inputs:
                    inputs_at.append((at, name, root, offset))
                elif root in self._outputs:
                    outputs_at.append((at, name, self._outputs.index(root), offset))
                else:
                    setattr(array[at], name, start + 4 * offsets[root] + offset)
        layers = [task.step for task in tasks]
        return _Ready(array, (memory, [task.struct for task in tasks]), layers, shapes, inputs_at, outputs_at)
