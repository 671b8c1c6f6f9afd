"""Convolutions of any window in training, as the kernel's frames compute them: see ``windows.h``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import WindowStruct, load_kernel
from .calls import chunk_size, in_chunks
from .compressed import compress
from .operands import call, pointing, readable


@dataclass(frozen=True)
class Side:
    """What a convolution does along the height, or along the width.

    Attributes:
        stride: pixels of the input from one output to the next.
        pad: zeros before the first pixel of the input; negative, so many pixels are left out.
        taps: where the first output reads, in the padded input.
        frame: pixels of a phase of the padded input.
        count: outputs.
        first: the first output's place in y.
        step: from there to the next.
    """

    stride: int
    pad: int
    taps: tuple[int, ...]
    frame: int
    count: int
    first: int = 0
    step: int = 1

    @classmethod
    def forwards(cls, count: int, kernel: int, stride: int, pad: int, dilation: int) -> Side:
        """Of a convolution with so many outputs."""
        taps = tuple(k * dilation for k in range(kernel))
        return cls(stride, pad, taps, count + taps[-1] // stride, count)

    @classmethod
    def backwards(cls, size: int, stride: int, pad: int, phase: int, shifts: Sequence[int]) -> Side:
        r"""Of the gradient of ``size`` inputs, those of one phase of the padded input: each is a sum over taps.

        Input :math:`i = s q + a - p` of phase a has a part of output :math:`q - r` for each tap at :math:`s r + a`.

        Args:
            size: of the input.
            stride: of the convolution.
            pad: likewise.
            phase: a.
            shifts: r of the taps of this phase.
        """
        q = -((phase - pad) // stride)
        first, most = stride * q + phase - pad, max(shifts)
        count = max(0, -(-(size - first) // stride))
        return cls(1, most - q, tuple(most - r for r in shifts), count + most, count, first, stride)


@dataclass(frozen=True)
class Lines:
    """Where the non-zeros of a weight ``(outputs, inputs, taps)`` are, in the order in which the kernel reads them.

    Attributes:
        inputs: channels.
        outputs: likewise.
        columns: int16, line (input, tap) within its chunk.
        rows: int32, where each output's non-zeros of each chunk begin, and the end.
        chunk: lines that are read at a time.
    """

    inputs: int
    outputs: int
    columns: Tensor
    rows: Tensor
    chunk: int

    @classmethod
    def of(cls, numbers: Tensor) -> tuple[Lines, Tensor]:
        """From int32 numbers ``(outputs, inputs, taps)`` with 0 where there is no weight.

        Returns:
            Itself, and the other numbers in its order.
        """
        matrix = numbers.reshape(len(numbers), -1)
        kept = matrix != 0
        _, columns, rows = compress(kept)
        found, lines = matrix[kept], matrix.shape[1]
        chunk = chunk_size(lines, len(found) / max(matrix.numel(), 1))
        if chunk < lines:
            found, columns, rows = in_chunks(found, columns, rows, chunk, -(-lines // chunk))
        return cls(numbers.shape[1], len(numbers), columns, rows, chunk), found


@dataclass(frozen=True)
class Planes:
    """Images whose planes are whole in memory.

    Attributes:
        tensor: contiguous float32.
        shape: ``(N, C, H, W)``.
        image: floats from an image to the next.
        channel: from a channel to the next.
    """

    tensor: Tensor
    shape: Sequence[int]
    image: int
    channel: int

    @classmethod
    def of(cls, tensor: Tensor, shape: Sequence[int], by_pixel: bool) -> Planes:
        """From ``(N, C, H, W)``, or, by pixel, from ``(1, C, 1, N H W)`` for this shape."""
        n, channels, height, width = shape
        plane = height * width
        distances = (plane, n * plane) if by_pixel else (channels * plane, plane)
        return cls(readable("input", tensor), shape, *distances)


def convolve(lines: Lines, sides: tuple[Side, Side], x: Planes, values: Tensor, bias: Tensor | None, y: Planes) -> None:
    """Write to y, or to the pixels of it that the sides are of, what a convolution makes of x."""
    struct = _struct(lines, sides, x, y, (values, bias), (None, None))
    call(load_kernel().revnets_windows, ctypes.byref(struct), torch.get_num_threads())


def weight_grad(
    lines: Lines, sides: tuple[Side, Side], x: Planes, dy: Planes, places: Tensor, gradient: Tensor
) -> None:
    """Write the gradient of each non-zero to its place."""
    struct = _struct(lines, sides, x, dy, (None, None), (places, gradient))
    sums = gradient.new_empty(len(places))
    call(load_kernel().revnets_windows_grad, ctypes.byref(struct), sums, torch.get_num_threads())


def _struct(
    lines: Lines,
    sides: tuple[Side, Side],
    x: Planes,
    y: Planes,
    weights: tuple[Tensor | None, Tensor | None],
    gradient: tuple[Tensor | None, Tensor | None],
) -> WindowStruct:
    high, wide = sides
    n, channels, height, width = x.shape
    if channels != lines.inputs or y.shape[:2] != (n, lines.outputs):
        raise ValueError(f"planes of {x.shape} and {y.shape}: expected {lines.inputs} and {lines.outputs} channels")
    pairs = [(i, j) for i in high.taps for j in wide.taps]
    taps = torch.tensor(pairs, dtype=torch.int32, device="cpu")
    line = y.shape[3]
    start = y.tensor.view(-1)[high.first * line + wide.first :]
    values, bias = weights
    pointers = (x.tensor, values, lines.columns, lines.rows, bias, taps, start, *gradient)
    numbers: tuple[int, ...] = (n, channels, height, width, x.image, x.channel)
    numbers += (lines.outputs, high.count, wide.count, y.image, y.channel, high.step * line, wide.step)
    numbers += (len(pairs), high.stride, wide.stride, high.pad, wide.pad, high.frame, wide.frame, lines.chunk)
    return pointing(WindowStruct, pointers, *numbers)
