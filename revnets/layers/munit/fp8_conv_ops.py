"""The products of an FP8 convolution as torch operators, opaque to ``torch.compile``, and their trial on a device.

Maps are ``(N, H, W, C')`` in FP8, channels padded with zeros to a multiple of 16. Triton is imported when they run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8 import ALIGNMENT, E4M3, E5M2, quantize

Geometry = tuple[list[int], list[int], list[int]]
"""Stride, padding, dilation, each down and right."""


def _empty(shape: Sequence[int], dtype: torch.dtype, last: bool, like: Tensor) -> Tensor:
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=memory_format)


def _laid_out(y: Tensor, last: bool) -> Tensor:
    """Channels-last as the kernels write, which is quicker than scattered numbers, or copied to contiguous memory."""
    return y if last else _empty(y.shape, y.dtype, False, y).copy_(y)


# --- operators -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("revnets::fp8_maps", mutates_args=())
def fp8_maps(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Clip, cast, pad: ``(N, C, H, W)`` of any strides to ``(N, H, W, C')``."""
    from .fp8_conv_triton import cast

    return cast(x, dtype, scale)


@fp8_maps.register_fake
def _(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, h, w, -(-c // ALIGNMENT) * ALIGNMENT), dtype=dtype)


@torch.library.custom_op("revnets::fp8_conv2d", mutates_args=())
def conv_output(
    maps: Tensor,
    taps: Tensor,
    geometry: Sequence[int],
    scale: float,
    dtype: torch.dtype,
    last: bool,
) -> Tensor:
    """Of ``(N, H, W, C')`` and ``(outputs, k, k, C')``."""
    from .fp8_conv_triton import convolve

    y = _empty(_output_shape(maps, taps, geometry), dtype, True, maps)
    convolve(maps, taps, y, _pairs(geometry), scale)
    return _laid_out(y, last)


@conv_output.register_fake
def _(
    maps: Tensor,
    taps: Tensor,
    geometry: Sequence[int],
    scale: float,
    dtype: torch.dtype,
    last: bool,
) -> Tensor:
    return _empty(_output_shape(maps, taps, geometry), dtype, last, maps)


def flattened(geometry: Geometry) -> list[int]:
    """As operators take it: six numbers."""
    return [number for pair in geometry for number in pair]


def _pairs(flat: Sequence[int]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    return flat[:2], flat[2:4], flat[4:]


def _output_shape(maps: Tensor, taps: Tensor, geometry: Sequence[int]) -> list[int]:
    return [maps.shape[0], taps.shape[0], *output_size(maps.shape[1:3], taps.shape[1:3], *_pairs(geometry))]


def output_size(size: Sequence[int], kernel: Sequence[int], *geometry: Sequence[int]) -> list[int]:
    """Height and width of an output, from those of input and kernel, and stride, padding, dilation."""
    sizes = zip(size, kernel, *geometry, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]


@torch.library.custom_op("revnets::fp8_conv2d_input", mutates_args=())
def conv_input_gradient(
    grads: Tensor,
    taps: Tensor,
    geometry: Sequence[int],
    scale: float,
    shape: Sequence[int],
    dtype: torch.dtype,
    last: bool,
) -> Tensor:
    """Of ``(N, H', W', outputs')`` and ``(C, k, k, outputs')``."""
    from .fp8_conv_triton import convolve_backward

    grad_x = _empty(shape, dtype, True, grads)
    convolve_backward(grads, taps, grad_x, _pairs(geometry), scale)
    return _laid_out(grad_x, last)


@torch.library.custom_op("revnets::fp8_conv2d_weight", mutates_args=())
def conv_weight_gradient(
    grads: Tensor,
    maps: Tensor,
    geometry: Sequence[int],
    scale: float,
    shape: Sequence[int],
    dtype: torch.dtype,
    last: bool,
) -> Tensor:
    """Of ``(N, H', W', outputs')`` and ``(N, H, W, C')``."""
    from .fp8_conv_triton import convolve_weight

    grad_weight = _empty(shape, dtype, last, grads)
    convolve_weight(grads, maps, grad_weight, _pairs(geometry), scale)
    return grad_weight


@conv_input_gradient.register_fake
@conv_weight_gradient.register_fake
def _(
    grads: Tensor,
    other: Tensor,
    geometry: Sequence[int],
    scale: float,
    shape: Sequence[int],
    dtype: torch.dtype,
    last: bool,
) -> Tensor:
    return _empty(shape, dtype, last, grads)


# --- without autograd -------------------------------------------------------------------------------------------------


def three_products(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    geometry: Geometry,
    scale: float = 1.0,
    grad_scale: float = 1.0,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient by the kernels, from operands of any precision, without autograd.

    Sums are kept in float32 and rounded once to ``out_dtype``, whatever the operands' precision was.

    Args:
        x: ``(N, C, H, W)``, not empty.
        weight: ``(outputs, C, k, k)``.
        grad: of the output, ``(N, outputs, H', W')``.
        geometry: stride, padding, dilation.
        scale: of the output, and of both gradients.
        grad_scale: static factor around the quantisation of ``grad``.
        out_dtype: of all three results, which are channels-last.
    """
    maps, taps, back = (fp8_maps(t, E4M3, 1.0) for t in (x, weight, weight.transpose(0, 1)))
    grads, flat, rescale = fp8_maps(grad, E5M2, grad_scale), flattened(geometry), scale / grad_scale
    return (
        conv_output(maps, taps, flat, scale, out_dtype, True),
        conv_input_gradient(grads, back, flat, rescale, list(x.shape), out_dtype, True),
        conv_weight_gradient(grads, maps, flat, rescale, list(weight.shape), out_dtype, True),
    )


def wrong(device: torch.device) -> str | None:
    """What is wrong with the three products of a small convolution on a device, if anything is.

    Args:
        device: that the kernels are to serve.
    """
    generator = torch.Generator().manual_seed(0)
    shapes, geometry = ((2, 24, 9, 7), (40, 24, 3, 3), (2, 40, 5, 4)), ([2, 2], [1, 1], [1, 1])
    x, weight, grad = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    got = three_products(x, weight, grad, geometry)
    operands = (quantize(t, dtype).double() for t, dtype in ((grad, E5M2), (x, E4M3), (weight, E4M3)))
    exact_grad, exact_x, exact_weight = operands
    expected = (
        F.conv2d(exact_x, exact_weight, None, *geometry),
        *torch.ops.aten.convolution_backward(
            *(exact_grad, exact_x, exact_weight, None, *geometry, False, [0, 0], 1, [True, True, False])
        )[:2],
    )
    for name, a, b in zip(("output", "input gradient", "weight gradient"), got, expected, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        if not error < 1e-3:
            return f"its {name} is off by {error:.1e} in the kernels' trial"
    return None
