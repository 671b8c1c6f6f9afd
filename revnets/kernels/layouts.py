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
    """Whether the channels of a pixel are neighbours in memory; of some channels of such images, too, as torch sees it.

    Example:
        >>> images = torch.zeros(2, 8, 3, 3).to(memory_format=torch.channels_last)
        >>> by_pixel(images), by_pixel(images[:, :4]), by_pixel(images.contiguous()[:, :4])
        (True, True, False)
    """
    return x.shape[2:] == (1, 1) or is_channels_last(x)


def is_channels_last(x: Tensor) -> bool:
    """As ``by_pixel``, but images of one pixel, which are both, are what their strides say, as torch has it.

    Example:
        >>> pixel = torch.zeros(2, 8, 1, 1)
        >>> is_channels_last(pixel), is_channels_last(pixel.to(memory_format=torch.channels_last))
        (False, True)
    """
    return x.stride(1) == 1 < x.stride(3) or (
        not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )


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


def images_by_pixel(model: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for images of this shape whose channels of a pixel are neighbours."""
    n, channels, height, width = shape
    strides = (height * width * channels, 1, width * channels, channels)
    return model.new_empty_strided((n, channels, height, width), strides)


def planes(x: Tensor, last: bool) -> Tensor:
    """The pixels of each channel one after the other: x, or ``(1, C, 1, N H W)`` where it is to be channels last."""
    if not last:
        return x.contiguous()
    matrix = pixels(x.contiguous(memory_format=torch.channels_last)).reshape(-1, x.shape[1])
    return transposed(matrix)[None, :, None]


def laid_out(y: Tensor, last: bool, shape: torch.Size) -> Tensor:
    """What was computed from ``planes``, of this shape, in their layout."""
    if not last:
        return y
    # no view of what `transposed` makes: autograd refuses changes in place of a view that a Function returns
    made = images_by_pixel(y, shape)
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
