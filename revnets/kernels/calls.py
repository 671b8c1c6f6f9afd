"""The layers that the kernel computes: what each tells it for operands of given shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .build import (
    ACTIVATIONS,
    CONVOLUTION,
    COPY,
    DEPTHWISE,
    LINEAR,
    MAP,
    MAX_POOL,
    MEAN,
    SCALE,
    UPSAMPLE,
    CallStruct,
    Geometry,
    load_kernel,
)
from .operands import address, call, pointing, readable
from .plan import Part, Plan, Shape, Step
from .quads import in_quads
from .quads import pay as quads_pay

_WEIGHTS_PER_LINE = 24  # of a chunk: fewer, and the sums between two chunks cost more than they save
_CHUNKS = (128, 256)  # inputs whose pixels fill the first cache, and the most that do no harm
_MIN_LINEAR = 0.2  # density: zeros of a linear layer cost less than their columns
_MOST = 2**15  # pixels of a kernel, stride, padding or dilation: more would fill the memory with padded lines


class _Layer:
    """A layer that can be called by itself, on contiguous float32 tensors on the CPU."""

    operands: tuple[str, ...] = ("input",)  # what they are called in messages

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        raise NotImplementedError

    def plan(self, operands: int, times: int = 1) -> Plan:
        """Of this layer alone; to time what it takes among others, so many times in one call."""
        return Plan([Step(self, tuple(range(operands)))] * times, operands, [operands], self.operands)

    def __call__(self, *operands: Tensor | None) -> Tensor:
        plans: dict[int, Plan] = self.__dict__.setdefault("_plans", {})
        given = [operand for operand in operands if operand is not None]
        if len(given) not in plans:
            plans[len(given)] = self.plan(len(given))
        return plans[len(given)](*given)[0]


def _struct(kind: int, shape: Shape, out: Shape, weights: Sequence[Tensor | None] = (), **numbers: int) -> CallStruct:
    """Weights are the struct's pointers from the first on."""
    n, channels, height, width = shape
    sizes = {"n": n, "c_in": channels, "h": height, "w": width, "c_out": out[1], "h_out": out[2], "w_out": out[3]}
    return pointing(CallStruct, weights, kind=kind, **sizes, **numbers)


class ConvCall(_Layer):
    """A layer of the kernel with its weights: ``activation(conv(x) + bias + residual)``.

    Args:
        geometry: of the convolution.
        values: non-zero weights, row after row; of depthwise ones all, ``(C, 1, k, k)``.
        columns: int16, where each is in its flattened row ``(C_in / groups, k, k)``; None for depthwise ones.
        rows: int32, where each output channel's weights begin, and the end; None for depthwise ones.
        bias: ``(C_out,)`` or None.
        activation: one of ``ACTIVATIONS``.
        once: it is called once: sorting its weights for images of their size would take longer than it saves.

    Raises:
        ValueError: for weights of other types, or that do not fit the geometry.
    """

    operands = ("input", "residual")

    def __init__(
        self,
        geometry: Geometry,
        values: Tensor,
        columns: Tensor | None,
        rows: Tensor | None,
        bias: Tensor | None,
        activation: str = "none",
        once: bool = False,
    ) -> None:
        self.geometry, self.kind, self._once = geometry, DEPTHWISE, once
        values, columns, rows, bias = _check_weights(geometry, values, columns, rows, bias)
        self._chunk = 1
        if columns is not None and rows is not None:
            self.kind = CONVOLUTION
            inputs = geometry.in_channels // geometry.groups * math.prod(geometry.kernel_size)
            self._density = len(values) / max(inputs * geometry.out_channels, 1)
            self._chunk = chunk_size(inputs, self._density)
            self._chunks = max(-(-inputs // self._chunk), 1)
            if self._chunk < inputs:
                values, columns, rows = in_chunks(values, columns, rows, self._chunk, self._chunks)
        self._kept = (None, values, columns, rows, bias)  # the first is for the input
        self._forms: dict[str, Sequence[Tensor]] = {}  # the same otherwise sorted, made when images need them
        self._activation = _activation(activation)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made again when it is called."""
        return {**self.__dict__, "_forms": {}, "_plans": {}}

    @property
    def takes_gates(self) -> bool:
        """Whether gates of its input cost less in it than in a pass of their own: each pixel is packed once."""
        return self.kind == CONVOLUTION and self.geometry.kernel_size == (1, 1)

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``; the residual, of the output's shape, is a second operand."""
        g, (n, channels, height, width) = self.geometry, shapes[0]
        if channels != g.in_channels:
            raise ValueError(f"input of {channels} channels: the convolution expects {g.in_channels}")
        out = (n, g.out_channels, *g.output_size(height, width))
        if len(shapes) > 1:
            check_residual(shapes[1], out)
        names = ("kh", "kw", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w", "groups")
        numbers = zip(names, (*g.kernel_size, *g.stride, *g.padding, *g.dilation, g.groups), strict=True)
        more = {"activation": self._activation, "chunk": self._chunk, **dict(numbers)}
        kind, weights, counts = self._form(height * width, out[2] * out[3])
        struct = _struct(kind, shapes[0], out, weights, **more)
        if counts is not None:
            struct.counts, struct.held = address(counts), (*weights, counts)
        return [Part(struct, _x_and_residual(shapes))], out

    def _form(self, pixels: int, pixels_out: int) -> tuple[int, Sequence[Tensor | None], Tensor | None]:
        """What is fastest for images of this size: the kind of call, its weights, and the counts of quads."""
        g, (_, values, columns, rows, bias) = self.geometry, self._kept
        if self._once or self.kind != CONVOLUTION or values is None or columns is None or rows is None:
            return self.kind, self._kept, None
        alone = (g.kernel_size, g.stride, g.padding, g.groups) == ((1, 1), (1, 1), (0, 0), 1) and pixels == 1
        if alone and self._density >= _MIN_LINEAR:
            if "dense" not in self._forms:
                self._forms["dense"] = [_dense(values, columns, rows, g, self._chunk)]
            return LINEAR, (None, *self._forms["dense"], None, None, bias), None
        if pixels_out == 1 or not quads_pay(len(values) / max(len(rows) - 1, 1)):
            return CONVOLUTION, self._kept, None
        if "quads" not in self._forms:
            self._forms["quads"] = in_quads(values, columns, rows, g.groups, self._chunks)
        *found, counts = self._forms["quads"]
        return CONVOLUTION, (None, *found, bias), counts


class LinearCall(_Layer):
    """A linear layer of images of one pixel: ``(N, C, 1, 1)`` to ``(N, C_out, 1, 1)``.

    Args:
        weight: ``(C_out, C)``.
        bias: ``(C_out,)`` or None.

    Raises:
        ValueError: for weights of other types or sizes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.dim() != 2:
            raise ValueError(f"weight of shape {tuple(weight.shape)}: expected (outputs, inputs)")
        self._outputs, self._inputs = weight.shape
        bias = None if bias is None else readable("bias", bias.detach(), numel=self._outputs)
        self._kept = (None, readable("weight", weight.detach()), None, None, bias)

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        if tuple(shapes[0][1:]) != (self._inputs, 1, 1):
            raise ValueError(f"input of shape {tuple(shapes[0])}: expected (N, {self._inputs}, 1, 1)")
        out = (shapes[0][0], self._outputs, 1, 1)
        return [Part(_struct(LINEAR, shapes[0], out, self._kept), {"x": 0})], out


def _dense(values: Tensor, columns: Tensor, rows: Tensor, g: Geometry, chunk: int) -> Tensor:
    """Weights of one chunk after another as a matrix."""
    line = row_of_each(rows, len(values))
    matrix = torch.zeros(g.out_channels, g.in_channels, device=values.device)
    matrix[line % g.out_channels, line // g.out_channels * chunk + columns.long()] = values
    return matrix


def check_residual(shape: Sequence[int], out: Sequence[int]) -> None:
    """A residual is as large as the output: it is not broadcast.

    Raises:
        ValueError: for another shape.
    """
    if tuple(shape) != tuple(out):
        raise ValueError(f"residual of shape {tuple(shape)}: expected {tuple(out)}, that of the output")


def check_gates(gates: Sequence[int], shape: Sequence[int]) -> None:
    """Gates are one number per plane.

    Raises:
        ValueError: for another shape.
    """
    if tuple(gates) != (*shape[:2], 1, 1):
        raise ValueError(f"gates of shape {tuple(gates)} for {tuple(shape)}: expected one per plane")


def _activation(name: str) -> int:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(name)


def check_geometry(g: Geometry) -> None:
    """Numbers that the kernel's loops rely on.

    Raises:
        ValueError: for others.
    """
    for name in ("kernel_size", "stride", "padding", "dilation"):
        least, numbers = int(name != "padding"), getattr(g, name)
        if not all(least <= number <= _MOST for number in numbers):
            raise ValueError(f"{name} of {numbers}: expected numbers from {least} to {_MOST}")
    if min(g.in_channels, g.out_channels) < 0 or g.groups < 1 or g.in_channels % g.groups or g.out_channels % g.groups:
        raise ValueError(
            f"{g.groups} groups of {g.in_channels} inputs and {g.out_channels} outputs: expected whole ones"
        )


def _check_weights(
    g: Geometry, values: Tensor, columns: Tensor | None, rows: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The weights as the kernel reads them, and only if it will not read elsewhere by them.

    What is returned has been checked: whoever made contiguous ones later would not know what those hold.
    """
    check_geometry(g)
    inputs = g.in_channels // g.groups * math.prod(g.kernel_size)
    if bias is not None:
        bias = readable("bias", bias.detach(), numel=g.out_channels)
    if columns is None or rows is None:
        if columns is not rows or not g.is_depthwise:
            raise ValueError("dense weights of a convolution that is not depthwise: expected columns and rows")
        return readable("values", values.detach(), numel=inputs * g.out_channels), None, None, bias
    for name, tensor in (("values", values), ("columns", columns), ("rows", rows)):
        if tensor.dim() != 1:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected one dimension")
    values = readable("values", values.detach())
    columns = readable("columns", columns.detach(), torch.int16, len(values))
    rows = readable("rows", rows.detach(), torch.int32, g.out_channels + 1)
    if not call(load_kernel().revnets_fits, columns, rows, g.out_channels, len(values), inputs):
        raise ValueError(
            f"columns or rows out of range: expected columns from 0 to {inputs - 1}, in a row each once and in order, "
            f"and rows that grow from 0 to {len(values)}, the number of values; are they of a layer of {g.in_channels} "
            "inputs?"
        )
    return values, columns, rows, bias


def _x_and_residual(shapes: Sequence[Shape]) -> dict[str, int]:
    return {"x": 0} if len(shapes) == 1 else {"x": 0, "residual": 1}


class MeanCall(_Layer):
    """The mean over the pixels, ``(N, C, H, W)`` to ``(N, C, 1, 1)``."""

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        out = (*shapes[0][:2], 1, 1)
        return [Part(_struct(MEAN, shapes[0], out), {"x": 0})], out


class ScaleCall(_Layer):
    """Planes ``(N, C, H, W)`` times gates ``(N, C, 1, 1)``."""

    operands = ("input", "gates")

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        check_gates(shapes[1], shapes[0])
        return [Part(_struct(SCALE, shapes[0], shapes[0]), _x_and_residual(shapes))], shapes[0]


class MapCall(_Layer):
    """``activation(x)``, or ``activation(x + residual)`` of two tensors of one shape."""

    operands = ("input", "residual")

    def __init__(self, activation: str = "none") -> None:
        self.activation = _activation(activation)

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        if len(set(shapes)) != 1:
            raise ValueError(f"a sum of shapes {shapes}: expected one shape")
        struct = _struct(MAP, shapes[0], shapes[0], activation=self.activation)
        return [Part(struct, _x_and_residual(shapes))], shapes[0]


class SliceCall(_Layer):
    """``count`` channels from ``first`` on."""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        n, channels, *size = shapes[0]
        if not 0 <= self._first <= self._first + self._count <= channels:
            raise ValueError(f"channels {self._first} to {self._first + self._count} of {channels}")
        out = (n, self._count, *size)
        return [Part(_struct(COPY, shapes[0], out, first_in=self._first, count=self._count), {"x": 0})], out


class CatCall(_Layer):
    """The operands' channels one after the other."""

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        n, _, *size = shapes[0]
        if any((shape[0], *shape[2:]) != (n, *size) for shape in shapes):
            raise ValueError(f"a concatenation of shapes {shapes}: expected one batch size, height and width")
        out, parts, first = (n, sum(shape[1] for shape in shapes), *size), [], 0
        for operand, shape in enumerate(shapes):
            parts.append(Part(_struct(COPY, shape, out, first_out=first, count=shape[1]), {"x": operand}))
            first += shape[1]
        return parts, out


class UpsampleCall(_Layer):
    """Bilinear upsampling by whole factors, 2 or more, of height and width, as torch's with ``align_corners=False``."""

    def __init__(self, factors: tuple[int, int]) -> None:
        if min(factors) < 2:
            raise ValueError(f"upsampling by {factors}: expected whole factors, 2 or more")
        self._factors = factors

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        n, channels, height, width = shapes[0]
        out = (n, channels, height * self._factors[0], width * self._factors[1])
        return [Part(_struct(UPSAMPLE, shapes[0], out), {"x": 0})], out


class MaxPoolCall(_Layer):
    """The largest pixel under a window: ``geometry`` without dilation."""

    def __init__(self, geometry: Geometry) -> None:
        check_geometry(geometry)
        if geometry.dilation != (1, 1):
            raise ValueError(f"max pooling of dilation {geometry.dilation}: expected (1, 1)")
        self._geometry = geometry

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        out, numbers = pooled(self._geometry, shapes[0])
        return [Part(_struct(MAX_POOL, shapes[0], out, **numbers), {"x": 0})], out


def pooled(g: Geometry, shape: Shape) -> tuple[Shape, dict[str, Any]]:
    """The shape that a pool leaves of another, and the fields of a call that say how."""
    names = ("kh", "kw", "stride_h", "stride_w", "pad_h", "pad_w")
    numbers = dict(zip(names, (*g.kernel_size, *g.stride, *g.padding), strict=True))
    return (*shape[:2], *g.output_size(*shape[2:])), numbers


def chunk_size(inputs: int, density: float) -> int:
    """How many inputs are multiplied before the next ones come into the first cache."""
    low, high = _CHUNKS
    if inputs <= low:
        return max(inputs, 1)
    most = min(max(_WEIGHTS_PER_LINE / max(density, 1e-6), low), high)
    return -(-inputs // math.ceil(inputs / most))


def row_of_each(rows: Tensor, count: int) -> Tensor:
    """The output channel of each of ``count`` compressed weights: int64."""
    return torch.repeat_interleave(
        torch.arange(len(rows) - 1, device=rows.device), rows.diff().long(), output_size=count
    )


def in_chunks(values: Tensor, columns: Tensor, rows: Tensor, size: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed weights chunk after chunk of the inputs, columns counted from the chunk's first."""
    outputs, row = len(rows) - 1, row_of_each(rows, len(values))
    chunk = columns.long() // size
    place, order = (chunk * outputs + row).sort(stable=True)
    counts = torch.bincount(place, minlength=number * outputs)
    starts = torch.zeros(number * outputs + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = counts.cumsum(0)
    return values[order], (columns.long() % size)[order].to(torch.int16), starts
