"""How the images that the kernel trains on lie in memory: plane by plane, or pixel by pixel (channels last)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .build import load_kernel
from .operands import call, readable


def check_images(x: Tensor) -> None:
    """Refuse what is no batch of images, ``(N, C, H, W)``.

    Raises:
        ValueError: for other numbers of dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"input of shape {tuple(x.shape)}: expected (N, C, H, W)")


def by_pixel(x: Tensor) -> bool:
    """Whether the channels of a pixel are neighbours in memory."""
    return x.shape[2:] == (1, 1) or (x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())


def like(grad: Tensor, x: Tensor | None) -> Tensor:
    """A gradient laid out as the layer's input is: so torch does, and the bits of the layers before depend on it."""
    if x is None or by_pixel(x) == by_pixel(grad):
        return grad
    return grad.contiguous(memory_format=torch.channels_last if by_pixel(x) else torch.contiguous_format)


def sums(grad: Tensor) -> Tensor:
    """Of each channel, ``(C,)``, in one order whatever the layout: a bias has the same bits in both."""
    return grad.contiguous().sum((0, 2, 3))


def pixels(x: Tensor) -> Tensor:
    """A view ``(N, H, W, C)``, which is contiguous where images are by pixel."""
    return x.permute(0, 2, 3, 1)


def images_by_pixel(model: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """Memory for as many images of this size whose channels of a pixel are neighbours."""
    height, width = size
    strides = (height * width * channels, 1, width * channels, channels)
    return model.new_empty_strided((len(model), channels, height, width), strides)


def planes(x: Tensor) -> Tensor:
    """The pixels of each channel one after the other: x, or ``(1, C, 1, N H W)`` where it is by pixel."""
    if not by_pixel(x):
        return x.contiguous()
    matrix = pixels(x.contiguous(memory_format=torch.channels_last)).reshape(-1, x.shape[1])
    return transposed(matrix)[None, :, None]


def laid_out(y: Tensor, model: Tensor, shape: torch.Size | None = None) -> Tensor:
    """What was computed from ``planes(model)``, of its height and width or of this shape, in its layout."""
    if not by_pixel(model):
        return y
    # no view of what `transposed` makes: autograd refuses changes in place of a view that a Function returns
    made = images_by_pixel(model, y.shape[1], model.shape[2:] if shape is None else shape[2:])
    _transpose(y[0, :, 0], pixels(made))
    return made


def transposed(x: Tensor) -> Tensor:
    """A float32 matrix, transposed and contiguous; torch takes two to three times as long.

    Raises:
        ValueError: for another tensor.

    Example:
        >>> transposed(torch.tensor([[1.0, 2.0]]))
        tensor([[1.],
                [2.]])
    """
    if x.dim() != 2:
        raise ValueError(f"a tensor of shape {tuple(x.shape)}: expected a matrix")
    x = readable("matrix", x)
    y = x.new_empty(x.shape[1], x.shape[0])
    _transpose(x, y)
    return y


def _transpose(x: Tensor, y: Tensor) -> None:
    """A matrix, transposed into the memory of y; both are contiguous."""
    call(load_kernel().revnets_transpose, x, *x.shape, y, torch.get_num_threads())
