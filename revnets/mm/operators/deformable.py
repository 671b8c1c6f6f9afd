"""Convolutions and attention at positions that the network chooses."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torchvision
from torch import Tensor

from .common import gradients


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: Any
) -> None:
    """Convolution at shifted positions (Dai et al., arXiv 1703.06211), into ``output``."""
    output.copy_(_deform(geometry)(input, offset, weight))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """Gradients of input and offsets."""
    found = gradients([input, offset, weight], [True, True, False], _deform(geometry), grad_output)
    grad_input.copy_(found[0])
    grad_offset.copy_(found[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float = 1,
    **geometry: Any,
) -> None:
    """Gradient of the weight, added ``scale`` times to ``grad_weight``."""
    (found,) = gradients([input, offset, grad_weight], [False, False, True], _deform(geometry), grad_output)
    grad_weight.add_(found, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """The same with a factor for each position (Zhu et al., arXiv 1811.11168)."""
    output.copy_(_deform(geometry)(input, offset, weight, mask, bias))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **geometry: Any,
) -> None:
    """All its gradients."""
    tensors = [input, offset, weight, mask, bias]
    needed = [True, True, True, True, bool(geometry["with_bias"])]
    targets = (grad_input, grad_offset, grad_weight, grad_mask, grad_bias)
    for target, found in zip(targets, gradients(tensors, needed, _deform(geometry), grad_output), strict=False):
        target.copy_(found)


def _deform(geometry: dict[str, Any]) -> Callable[..., Tensor]:
    """torchvision's convolution with mmcv's arguments, which name height and width in two ways."""
    plain = "dH" in geometry
    names = ("dH", "dW", "padH", "padW", "dilationH", "dilationW")
    modulated = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    values = [geometry[name] for name in (names if plain else modulated)]
    with_bias = not plain and geometry["with_bias"]

    sizes = (tuple(values[:2]), tuple(values[2:4]), tuple(values[4:]))

    def convolve(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None, bias: Any = None) -> Tensor:
        if mask is not None:
            size = [
                (n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
                for n, kernel, stride, pad, dilation in zip(input.shape[2:], weight.shape[2:], *sizes, strict=True)
            ]
            offset, mask = _first(offset, size), _first(mask, size)
        return torchvision.ops.deform_conv2d(input, offset, weight, bias if with_bias else None, *sizes, mask)

    return convolve


def _first(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Of maps larger than the output, mmcv reads the first values in memory: so DyHead's networks were trained."""
    count = math.prod(size)
    if list(maps.shape[2:]) == list(size) or maps.shape[2:].numel() < count:
        return maps
    return maps.flatten(1)[:, : maps.shape[1] * count].reshape(*maps.shape[:2], *size)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    r"""Weighted sums of samples from several maps (Deformable DETR, arXiv 2010.04159), by mmcv's own function for CPUs.

    Args:
        value: the maps, flattened: ``(N, sum of H * W, heads, channels)``.
        value_spatial_shapes: ``(H, W)`` of each.
        value_level_start_index: where each starts; it follows from the shapes.
        sampling_locations: x and y from 0 to 1: ``(N, queries, heads, levels, points, 2)``.
        attention_weights: ``(N, queries, heads, levels, points)``.
        im2col_step: images at a time, of no meaning here.

    Returns:
        ``(N, queries, heads * channels)``.
    """
    return _attention(value_spatial_shapes)(value, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of maps, locations and weights."""
    tensors = [value, sampling_locations, attention_weights]
    found = gradients(tensors, [True] * 3, _attention(value_spatial_shapes), grad_output)
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), found, strict=True):
        target.copy_(grad)


def _attention(shapes: Tensor) -> Callable[..., Tensor]:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # which imports these operators

    sizes = shapes.tolist()
    return lambda value, locations, weights: multi_scale_deformable_attn_pytorch(value, sizes, locations, weights)
