"""A convolution's numbers as the kernel takes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...kernels.build import Geometry


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """Its numbers, padding by words as what it is for kernels of odd sides.

    Example:
        >>> geometry_of(nn.Conv2d(8, 16, 3, padding="same")).padding
        (1, 1)
    """
    kernel, stride, dilation = map(_pair, (conv.kernel_size, conv.stride, conv.dilation))
    padding: Any = conv.padding
    if isinstance(padding, str):
        sides = zip(kernel, dilation, strict=True)
        padding = [d * (k - 1) // 2 if padding == "same" else 0 for k, d in sides]
    pads = _pair(padding)
    return Geometry(conv.in_channels, conv.out_channels, kernel, stride, pads, dilation, conv.groups)


def _pair(number: Any) -> tuple[int, int]:
    """Of one number for both sides, as torch takes it where somebody sets it on a layer, or of two."""
    numbers = (number,) if isinstance(number, int) else tuple(number)
    return int(numbers[0]), int(numbers[-1])
