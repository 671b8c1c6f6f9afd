"""Layers of bytes (uint8 with a zero point) that the kernel computes; see ``bytes.h`` for what they compute, exactly.

Values between them are ``(N, C / 4, H, W, 4)``, channels rounded up to fours: shapes here are ``(N, C, H, W)`` with
such a C. Weights are int8, of convolutions in blocks of four input channels; those that are all 0 are not kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import CallStruct, Geometry, load_kernel
from .byte_blocks import fours, reciprocal
from .byte_pairs import in_pairs
from .calls import check_geometry, check_residual, in_chunks, pooled
from .operands import call, pointing, readable
from .plan import Part, Plan, Shape, Step

CONVOLUTION, DEPTHWISE, LINEAR, MEAN, MAP, SCALE, MAX_POOL, TO_BYTES, FROM_BYTES = range(9, 18)  # ``Kind`` of call.h
_LINES = 128  # of a panel, four input channels each: of four vectors of pixels they fill the first cache


@dataclass(frozen=True)
class Finish:
    """How sums become the output: ``q = min(max(round(t) + zero, low), high)``, by the table where there is one.

    ``t = sum * scale`` in float32, with a residual r ``t + (r - residual_zero) * residual_scale``, rounded after every
    operation; ``round`` takes ties to even.

    Attributes:
        scale: float32, of each output channel.
        zero: of the output.
        low: of the output's bytes; a ReLU is ``low=zero``.
        high: ReLU6 is where 6 lies.
        table: uint8, what each of the 256 bytes becomes, such as an activation.
        residual_scale: of what is added.
        residual_zero: its zero point.
        to_float: the output is t, as floats ``(N, C, H, W)``.
    """

    scale: Tensor
    zero: int = 0
    low: int = 0
    high: int = 255
    table: Tensor | None = None
    residual_scale: float = 0.0
    residual_zero: int = 0
    to_float: bool = False

    def __post_init__(self) -> None:
        for name in ("zero", "low", "high", "residual_zero"):
            if not 0 <= getattr(self, name) <= 255:
                raise ValueError(f"{name}={getattr(self, name)}: expected a byte, 0 to 255")
        if self.scale.dim() != 1 or (self.table is not None and self.table.dim() != 1):
            raise ValueError("a scale or a table of several dimensions: expected one")

    def numbers(self) -> dict[str, Any]:
        """Fields of a call."""
        names = {"zero_out": self.zero, "low": self.low, "high": self.high, "to_float": int(self.to_float)}
        return {**names, "zero_residual": self.residual_zero, "residual_scale": self.residual_scale}

    def checked_table(self) -> Tensor | None:
        """The table as the kernel reads it."""
        return None if self.table is None else readable("table", self.table.detach(), torch.uint8, 256)


class _ByteLayer:
    """A layer that can be called by itself."""

    takes_bytes = gives_bytes = True
    operands: tuple[str, ...] = ("input",)

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        raise NotImplementedError

    def plan(self, operands: int, times: int = 1) -> Plan:
        """Of this layer alone; to time what it takes among others, so many times in one call."""
        return Plan([Step(self, tuple(range(operands)))] * times, operands, [operands], self.operands)

    def __call__(self, *operands: Tensor | None) -> Tensor:
        given = [operand for operand in operands if operand is not None]
        return self.plan(len(given))(*given)[0]


def _part(kind: int, shapes: Sequence[Shape], out: Shape, weights: Sequence[Tensor | None], **numbers: Any) -> Part:
    """Weights: values, columns, rows, bias, scales, table, as many as there are."""
    n, channels, height, width = shapes[0]
    sizes = {"n": n, "c_in": channels, "h": height, "w": width, "c_out": out[1], "h_out": out[2], "w_out": out[3]}
    held = [*weights, *[None] * (6 - len(weights))]
    pointers = [None, *held[:4], None, None, *held[4:]]
    reads = {"x": 0} if len(shapes) == 1 else {"x": 0, "residual": 1}
    return Part(pointing(CallStruct, pointers, kind=kind, **{**sizes, **numbers}), reads)


class _Weighted(_ByteLayer):
    """What layers with weights share: bias, scale and zero points of every output channel."""

    operands = ("input", "residual")

    def __init__(self, outputs: int, bias: Tensor | None, zero_in: int, finish: Finish, sums: Tensor, most: Tensor):
        """``sums`` of the weights of each output channel, and of their magnitudes, both int64."""
        if not 0 <= zero_in <= 255:
            raise ValueError(f"zero_in={zero_in}: expected a byte, 0 to 255")
        if finish.to_float and finish.table is not None:
            raise ValueError("a table for an output of floats: expected none")
        self.outputs, self.zero_in, self.finish, self.gives_bytes = outputs, zero_in, finish, not finish.to_float
        given = torch.zeros(outputs, dtype=torch.int32, device="cpu") if bias is None else bias.detach()
        given = F.pad(readable("bias", given, torch.int32, outputs).long(), (0, len(sums) - outputs))
        scale = readable("scale", finish.scale.detach(), torch.float32, outputs)
        self._scale = F.pad(scale, (0, len(sums) - outputs))
        largest = 255 * most + given.abs()
        if not bool((largest < 2**31).all()):
            raise ValueError("sums of a layer's products may leave int32: expected fewer inputs, or a smaller bias")
        reach = largest * self._scale.abs().double() + 255 * abs(finish.residual_scale)
        if not finish.to_float and not bool((reach < 2**30).all()):
            raise ValueError(
                f"scaled sums of up to {float(reach.max()):.1e}: expected less than 2^30; is a scale wrong?"
            )
        self._bias = (given - zero_in * sums).to(torch.int32)
        self._table = finish.checked_table()

    def _numbers(self, shapes: Sequence[Shape], out: Shape) -> dict[str, Any]:
        if len(shapes) > 1:
            check_residual(shapes[1], (out[0], fours(out[1]), *out[2:]))
        return {"zero_in": self.zero_in, "count": self.outputs, **self.finish.numbers(), "c_out": fours(self.outputs)}

    def _out(self, shape: Shape) -> Shape:
        return (shape[0], self.outputs if self.finish.to_float else fours(self.outputs), *shape[2:])


class ByteConvCall(_Weighted):
    """A convolution of bytes with its weights: ``finish(conv(x - zero_in) + bias, residual)``.

    Args:
        geometry: of the convolution; groups are zeros of the weights, see ``compress_bytes``.
        values: of ``compress_bytes``.
        columns: of it.
        rows: of it.
        bias: int32, ``(C_out,)``, or None.
        zero_in: the input's zero point, also around it.
        finish: what becomes of the sums.

    Raises:
        ValueError: for weights of other types, that do not fit the geometry, or whose sums may leave int32.
    """

    def __init__(
        self,
        geometry: Geometry,
        values: Tensor,
        columns: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        zero_in: int,
        finish: Finish,
    ) -> None:
        check_geometry(geometry)
        self.geometry, self._given = geometry, (geometry, values, columns, rows, bias, zero_in, finish)
        lines = fours(geometry.in_channels) // 4 * math.prod(geometry.kernel_size)
        outputs = fours(geometry.out_channels)
        values = readable("values", values.detach(), torch.int8)
        columns = readable("columns", columns.detach(), torch.int16, values.numel() // 4)
        rows = readable("rows", rows.detach(), torch.int32, outputs + 1)
        if values.shape[1:] != (4,) or columns.dim() != 1 or rows.dim() != 1:
            raise ValueError(f"values of shape {tuple(values.shape)}: expected (blocks, 4)")
        if not call(load_kernel().revnets_fits, columns, rows, outputs, len(values), lines):
            raise ValueError(
                f"columns or rows out of range: expected columns from 0 to {lines - 1}, in a row each once and in "
                f"order, and rows that grow from 0 to {len(values)}, the number of blocks"
            )
        row = torch.repeat_interleave(torch.arange(outputs, device="cpu"), rows.diff().long())
        sums, most = (
            torch.zeros(outputs, dtype=torch.int64, device="cpu").index_add_(0, row, part)
            for part in (values.long().sum(1), values.long().abs().sum(1))
        )
        super().__init__(geometry.out_channels, bias, zero_in, finish, sums, most)
        self._chunk = lines if lines <= _LINES else -(-lines // -(-lines // _LINES))
        if self._chunk < lines:
            values, columns, rows = in_chunks(values, columns, rows, self._chunk, -(-lines // self._chunk))
        if load_kernel().revnets_byte_pairs():
            values, columns, rows, constant = in_pairs(values, columns, rows)
            self._bias = (self._bias + constant.view(-1, outputs).sum(0)).to(torch.int32)
        self._weights = (values, columns, rows, self._bias, self._scale, self._table)

    def __reduce__(self) -> Any:
        return ByteConvCall, self._given  # how weights lie is of this machine's kernel

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``; the residual, of the output's shape, is a second operand."""
        g, (n, channels, height, width) = self.geometry, shapes[0]
        if channels != fours(g.in_channels):
            raise ValueError(f"input of {channels} channels: the convolution expects {fours(g.in_channels)}")
        out = self._out((n, 0, *g.output_size(height, width)))
        numbers = self._numbers(shapes, out)
        names = ("kh", "kw", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w")
        sizes = (*g.kernel_size, *g.stride, *g.padding, *g.dilation)
        numbers |= {"chunk": max(self._chunk, 1), **dict(zip(names, sizes, strict=True))}
        if (g.kernel_size, g.stride, g.padding) == ((1, 1), (1, 1), (0, 0)):  # one line of pixels
            numbers |= {"h": 1, "w": height * width, "h_out": 1, "w_out": height * width}
        return [_part(CONVOLUTION, shapes, out, self._weights, **numbers)], out


class ByteDepthwiseCall(_Weighted):
    """A depthwise convolution of bytes; weights are int8 ``(C, 1, kh, kw)``, the rest as of ``ByteConvCall``."""

    def __init__(self, geometry: Geometry, weight: Tensor, bias: Tensor | None, zero_in: int, finish: Finish) -> None:
        check_geometry(geometry)
        channels, (height, width) = geometry.in_channels, geometry.kernel_size
        if not geometry.groups == channels == geometry.out_channels:
            raise ValueError("a depthwise convolution whose groups are no single channels")
        if finish.to_float:
            raise ValueError("a depthwise convolution of bytes to floats: expected bytes")
        self.geometry = geometry
        weight = readable("weight", weight.detach(), torch.int8, channels * height * width)
        taps = weight.reshape(channels, height, width)
        taps = F.pad(taps, (0, -width % 4, 0, 0, 0, -channels % 4))
        sums, most = taps.long().sum((1, 2)), taps.long().abs().sum((1, 2))
        super().__init__(channels, bias, zero_in, finish, sums, most)
        taps = taps.reshape(len(taps) // 4, 4, height, -1, 4).permute(0, 2, 3, 1, 4).contiguous()
        self._weights = (taps, None, None, self._bias, self._scale, self._table)

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``; the residual, of the output's shape, is a second operand."""
        g, (n, channels, height, width) = self.geometry, shapes[0]
        if channels != fours(g.in_channels):
            raise ValueError(f"input of {channels} channels: the convolution expects {fours(g.in_channels)}")
        out = (n, channels, *g.output_size(height, width))
        numbers = self._numbers(shapes, out)
        names = ("kh", "kw", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w")
        numbers |= dict(zip(names, (*g.kernel_size, *g.stride, *g.padding, *g.dilation), strict=True))
        return [_part(DEPTHWISE, shapes, out, self._weights, **numbers)], out


class ByteLinearCall(_Weighted):
    """A linear layer of images of one pixel; weights are int8 ``(C_out, C_in)``, the rest as of ``ByteConvCall``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, zero_in: int, finish: Finish) -> None:
        outputs, inputs = weight.shape
        self.inputs = inputs
        dense = F.pad(readable("weight", weight.detach(), torch.int8), (0, -inputs % 4, 0, -outputs % 64))
        super().__init__(outputs, bias, zero_in, finish, dense.long().sum(1), dense.long().abs().sum(1))
        dense = dense.reshape(len(dense) // 16, 16, -1, 4).transpose(1, 2).contiguous()
        self._weights = (dense, None, None, self._bias, self._scale, self._table)

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``; the residual, of the output's shape, is a second operand."""
        n, channels, *size = shapes[0]
        if channels != fours(self.inputs) or size != [1, 1]:
            raise ValueError(f"input of shape {shapes[0]}: expected (N, {fours(self.inputs)}, 1, 1)")
        out = self._out((n, 0, 1, 1))
        return [_part(LINEAR, shapes, out, self._weights, **self._numbers(shapes, out))], out


class _Plain(_ByteLayer):
    """A layer without weights: its scale, of all channels, is one number."""

    kind = MAP

    def __init__(self, zero_in: int, finish: Finish) -> None:
        if not 0 <= zero_in <= 255:
            raise ValueError(f"zero_in={zero_in}: expected a byte, 0 to 255")
        if finish.to_float:
            raise ValueError("a layer without weights to floats: expected bytes")
        self.zero_in, self.finish, self._table = zero_in, finish, finish.checked_table()

    def _part(self, shapes: Sequence[Shape], out: Shape, scale: float, **numbers: Any) -> Part:
        weights = (None, None, None, None, None, self._table)
        numbers |= {"zero_in": self.zero_in, "scale": scale, **self.finish.numbers()}
        return _part(self.kind, shapes, out, weights, **numbers)


class ByteMeanCall(_Plain):
    """The mean over the pixels: of their sum times ``scale / pixels``, ``scale`` of the finish being one number."""

    kind = MEAN

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        pixels, out = shapes[0][2] * shapes[0][3], (*shapes[0][:2], 1, 1)
        if pixels > 2**22:
            raise ValueError(f"a mean of {pixels} pixels: expected at most {2**22}")
        return [self._part(shapes, out, float(self.finish.scale / pixels))], out


class ByteMapCall(_Plain):
    """``finish(x - zero_in, residual)``, pixel by pixel: a sum, an activation, another scale."""

    operands = ("input", "residual")

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        if len(set(shapes)) != 1:
            raise ValueError(f"a sum of shapes {shapes}: expected one shape")
        return [self._part(shapes, shapes[0], float(self.finish.scale))], shapes[0]


class ByteScaleCall(_Plain):
    """Planes times gates ``(N, C, 1, 1)``: ``finish((x - zero_in) * (gate - residual_zero))``."""

    kind, operands = SCALE, ("input", "gates")

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        if shapes[1] != (*shapes[0][:2], 1, 1):
            raise ValueError(f"gates of shape {shapes[1]} for {shapes[0]}: expected one per plane")
        return [self._part(shapes, shapes[0], float(self.finish.scale))], shapes[0]


class ByteMaxPoolCall(_ByteLayer):
    """The largest pixel under a window: ``geometry`` without dilation, padding less than half a window."""

    def __init__(self, geometry: Geometry) -> None:
        check_geometry(geometry)
        fits = all(2 * pad <= size for pad, size in zip(geometry.padding, geometry.kernel_size, strict=True))
        if geometry.dilation != (1, 1) or not fits:
            raise ValueError(f"max pooling of dilation {geometry.dilation}, padding {geometry.padding}: too large")
        self._geometry = geometry

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        out, numbers = pooled(self._geometry, shapes[0])
        return [_part(MAX_POOL, shapes, out, (), **numbers)], out


class ToBytesCall(_ByteLayer):
    """Floats ``(N, C, H, W)`` to bytes: ``round(x * (1 / scale)) + zero``, saturated; NaN becomes the lowest."""

    takes_bytes = False

    def __init__(self, scale: float, zero: int) -> None:
        self._inverse = reciprocal(scale)
        self._finish = Finish(torch.ones(1), zero)

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        n, channels, *size = shapes[0]
        out = (n, fours(channels), *size)
        return [_part(TO_BYTES, shapes, out, (), count=channels, scale=self._inverse, **self._finish.numbers())], out


class FromBytesCall(_ByteLayer):
    """Bytes to floats ``(N, channels, H, W)``: ``(x - zero) * scale``."""

    gives_bytes = False

    def __init__(self, channels: int, scale: float, zero: int) -> None:
        self._channels, self._scale = channels, scale
        self._finish = dataclasses.replace(Finish(torch.ones(1)), zero=zero)

    def parts(self, shapes: Sequence[Shape]) -> tuple[list[Part], Shape]:
        """See ``Call``."""
        n, channels, *size = shapes[0]
        if channels != fours(self._channels):
            raise ValueError(f"input of {channels} channels: expected {fours(self._channels)}")
        numbers = {"count": self._channels, "zero_in": self._finish.zero, "scale": self._scale}
        return [_part(FROM_BYTES, shapes, (n, self._channels, *size), (), **numbers)], (n, self._channels, *size)
