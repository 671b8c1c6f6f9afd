"""The kernel in training: convolutions of windows larger than a pixel, and of strides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import frames
from .build import Geometry
from .calls import check_geometry
from .compressed import MAX_COLUMNS
from .frames import Lines, Planes, Side
from .layouts import check_images, is_channels_last, laid_out, planes, sums
from .operands import readable
from .training import Structure, gathered

MAX_STRIDE = 8  # frames have its square of phases
MAX_FRAME = 2**24  # bytes of an image's frame that breakeven.py allows: every thread keeps the memory of its largest


@dataclass(frozen=True)
class _Phase:
    """The weights that inputs of one phase of the padded input see, with input and output exchanged.

    Attributes:
        phase: of the rows and of the columns.
        shifts: of the taps, likewise; see ``Side.backwards``.
        lines: where the weights are.
        order: int32, of its values among those of the structure.
    """

    phase: tuple[int, int]
    shifts: tuple[list[int], list[int]]
    lines: Lines
    order: Tensor


class WindowStructure(Structure):
    """What the kernel has to know of the mask of a convolution of one group, of any window, stride and padding.

    Args:
        mask: bool, ``(C_out, C_in, kh, kw)``, on the CPU.
        geometry: of the convolution.

    Raises:
        ValueError: for a mask that is not bool on the CPU, or is not of the geometry.

    Example:
        >>> mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
        >>> structure = WindowStructure(mask, Geometry(1, 1, (3, 3), (2, 2), (1, 1)))
        >>> structure.convolve(torch.ones(1, 1, 4, 4), torch.ones(9)).flatten().tolist()
        [4.0, 6.0, 6.0, 9.0]
    """

    def __init__(self, mask: Tensor, geometry: Geometry) -> None:
        check_geometry(geometry)
        g = geometry
        if mask.shape != (g.out_channels, g.in_channels, *g.kernel_size) or g.groups != 1:
            raise ValueError(f"a mask of shape {tuple(mask.shape)}: expected that of {geometry}, of one group")
        self._check_mask(mask)
        mask = readable("mask", mask.detach(), torch.bool)
        self.geometry, self._numel = geometry, mask.numel()
        self.verdicts = {}
        numbers = torch.arange(1, mask.numel() + 1, dtype=torch.int32, device="cpu").view(mask.shape) * mask
        self._lines, found = Lines.of(numbers.flatten(2))
        self.places = found - 1
        self.density = len(found) / max(mask.numel(), 1)
        ranks = torch.zeros(mask.numel(), dtype=torch.int32, device="cpu")
        ranks[self.places.long()] = torch.arange(1, len(found) + 1, dtype=torch.int32, device="cpu")
        self._phases = _phases(ranks.view(mask.shape), geometry)

    def convolve(self, x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H', W')`` in the same memory layout.

        Raises:
            ValueError: for other numbers of dimensions, channels or values, other types, another device.
        """
        check_images(x)
        values = readable("values", values, numel=len(self.places))
        bias = None if bias is None else readable("bias", bias, numel=self.geometry.out_channels)
        g, last = self.geometry, is_channels_last(x)
        given = _planes(x, last)
        out = torch.Size((len(x), g.out_channels, *g.output_size(*x.shape[2:])))
        if min(out[2:]) < 1 or x.shape[1] != g.in_channels:
            raise ValueError(f"input of shape {tuple(x.shape)}: too small, or not of {g.in_channels} channels")
        y = _made(x, out, last)
        if y.tensor.numel():
            frames.convolve(self._lines, self._sides(out), given, values, bias, y)
        return laid_out(y.tensor, last, out)

    def grads(
        self,
        grad: Tensor,
        x: Tensor | None,
        values: Tensor,
        shape: torch.Size,
        needed: Sequence[bool],
        size: torch.Size | None = None,
        last: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See ``Structure.grads``."""
        check_images(grad)
        if x is not None:  # what strides say of the gradient of a single pixel is nothing
            size, last = x.shape, is_channels_last(x)
        self._check_sizes(grad, size, shape)
        dy = _planes(grad, last)
        grad_x = grad_weight = grad_bias = None
        if needed[0] and size is not None:
            dx = _made(grad, size, last)
            self._input_grad(dy, readable("values", values, numel=len(self.places)), dx)
            grad_x = laid_out(dx.tensor, last, size)
        if needed[1] and x is not None:
            grad_weight = grad.new_empty(shape) if grad.numel() else grad.new_zeros(shape)
            if grad.numel():
                given = _planes(x, last)
                frames.weight_grad(self._lines, self._sides(grad.shape), given, dy, self.places, grad_weight)
        if needed[2]:
            grad_bias = sums(grad)
        return grad_x, grad_weight, grad_bias

    def _check_sizes(self, grad: Tensor, size: torch.Size | None, shape: torch.Size) -> None:
        g = self.geometry
        self._check_size(math.prod(shape))
        expected = None if size is None else (size[0], g.out_channels, *g.output_size(*size[2:]))
        if expected is None or size is None or size[1] != g.in_channels or grad.shape != expected:
            raise ValueError(f"gradient of shape {tuple(grad.shape)} for an input of {size}: expected {expected}")

    def _sides(self, out: Sequence[int]) -> tuple[Side, Side]:
        g = self.geometry
        numbers = zip(out[2:], g.kernel_size, g.stride, g.padding, g.dilation, strict=True)
        high, wide = (Side.forwards(*each) for each in numbers)
        return high, wide

    def _input_grad(self, dy: Planes, values: Tensor, dx: Planes) -> None:
        g, size = self.geometry, dx.shape
        if len(self._phases) < math.prod(g.stride):
            dx.tensor.zero_()  # no weight sees the others
        for part in self._phases:
            numbers = zip(size[2:], g.stride, g.padding, part.phase, part.shifts, strict=True)
            high, wide = (Side.backwards(*each) for each in numbers)
            if size[0] and high.count and wide.count:
                frames.convolve(part.lines, (high, wide), dy, gathered(values, part.order), None, dx)


def _planes(x: Tensor, last: bool) -> Planes:
    return Planes.of(planes(x, last), x.shape, last)


def _made(model: Tensor, shape: torch.Size, last: bool) -> Planes:
    """Memory for a result of this shape."""
    n, channels, height, width = shape
    return Planes.of(model.new_empty((1, channels, 1, n * height * width) if last else shape), shape, last)


def _phases(ranks: Tensor, g: Geometry) -> list[_Phase]:
    """From int32 ranks of a structure's values, from 1 on, where its weights are ``(C_out, C_in, kh, kw)``."""
    found = []
    for phase in itertools.product(*map(range, g.stride)):
        taps = [
            [k for k in range(kernel) if k * dilation % stride == a]
            for a, kernel, stride, dilation in zip(phase, g.kernel_size, g.stride, g.dilation, strict=True)
        ]
        if not all(taps):
            continue
        shifts = [[k * d // s for k in each] for each, d, s in zip(taps, g.dilation, g.stride, strict=True)]
        part = ranks[:, :, taps[0]][:, :, :, taps[1]].transpose(0, 1).flatten(2)
        lines, order = Lines.of(part)
        found.append(_Phase((phase[0], phase[1]), (shifts[0], shifts[1]), lines, order - 1))
    return found


def structure_of(mask: Tensor, geometry: Geometry) -> Structure:
    """What the kernel has to know of the mask of a convolution."""
    return Structure(mask, geometry.groups) if is_pointwise(geometry) else WindowStructure(mask, geometry)


def is_pointwise(geometry: Geometry) -> bool:
    """Whether an output is a sum over one pixel of the input, the one in its place.

    Example:
        >>> is_pointwise(Geometry(64, 64)), is_pointwise(Geometry(64, 64, stride=(2, 2)))
        (True, False)
    """
    g = geometry
    return (g.kernel_size, g.stride, g.padding) == ((1, 1), (1, 1), (0, 0))


def windows_fit(geometry: Geometry) -> bool:
    """Whether the kernel's numbers can count the weights of such a layer, which is of one group.

    Example:
        >>> windows_fit(Geometry(64, 64, (3, 3))), windows_fit(Geometry(64, 64, (3, 3), groups=64))
        (True, False)
    """
    taps = math.prod(geometry.kernel_size)
    most = max(geometry.in_channels, geometry.out_channels) * taps
    return geometry.groups == 1 and max(geometry.stride) <= MAX_STRIDE and most <= MAX_COLUMNS


def frame_bytes(geometry: Geometry, height: int, width: int) -> int:
    """What a frame of one image takes at most: of the input, or of the output's gradient for that of the input.

    Example:
        >>> frame_bytes(Geometry(64, 128, (3, 3), (1, 1), (1, 1)), 14, 14) // 4 == 128 * 16 * 16
        True
        >>> frame_bytes(Geometry(64, 128), 14, 14)
        0
    """
    g = geometry
    if is_pointwise(g):
        return 0
    high, wide = zip(g.output_size(height, width), (height, width), g.kernel_size, g.stride, g.dilation, strict=True)
    pixels = [1, 1]
    for out, size, k, stride, dilation in (high, wide):
        reach = dilation * (k - 1) // stride
        pixels = [pixels[0] * stride * (out + reach), pixels[1] * (-(-size // stride) + reach)]
    return 4 * max(g.in_channels * pixels[0], g.out_channels * pixels[1])
