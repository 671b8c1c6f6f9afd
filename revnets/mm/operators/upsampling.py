"""Operators on maps: upsampling by kernels that the network predicts, and convolutions at chosen pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import gradients


def _reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """One product of maps per tap of the kernel: nothing of ``kernel_size ** 2`` times the channels exists."""
    n, channels, height, width = features.shape
    taps = F.pixel_unshuffle(masks, scale_factor)  # whatever comes from one pixel lies in channels of that pixel
    taps = taps.view(n, group_size, 1, kernel_size**2, scale_factor**2, height, width)
    padded = F.pad(features, [kernel_size // 2] * 4)
    padded = padded.unflatten(1, (group_size, channels // group_size, 1))
    total = features.new_zeros(())
    for tap in range(kernel_size**2):
        row, column = divmod(tap, kernel_size)
        shifted = padded[..., row : row + height, column : column + width]
        total = torch.addcmul(total, shifted, taps[:, :, :, tap])
    return F.pixel_shuffle(total.reshape(n, channels * scale_factor**2, height, width), scale_factor)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    r"""Each pixel a weighted sum around the pixel that it comes from (CARAFE, arXiv 1905.02188), into ``output``.

    .. math:: y_{c, p} = \sum_{i, j} m_{g(c) K^2 + i K + j, \, p} \; x_{c, \, \lfloor p / s \rfloor + (i, j) - r}

    Args:
        features: ``(N, C, H, W)``, zero around.
        masks: ``(N, group_size * kernel_size ** 2, H * s, W * s)``.
        output: ``(N, C, H * s, W * s)``.
        kernel_size: K, odd; r is its half.
        group_size: groups of channels that share their weights.
        scale_factor: s.
    """
    output.copy_(_reassemble(features, masks, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of features and weights."""
    sizes = (kernel_size, group_size, scale_factor)
    found = gradients([features, masks], [True, True], lambda x, m: _reassemble(x, m, *sizes), grad_output)
    grad_input.copy_(found[0])
    grad_masks.copy_(found[1])


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """The same; the features go into ``rfeatures``, where ``carafe_backward`` is given them."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of features and weights."""
    sizes = (kernel_size, group_size, scale_factor)
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, *sizes)


def masked_im2col_forward(
    features: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    data_col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """What a convolution sees at M pixels of an image ``(1, C, H, W)``, into ``data_col`` ``(C * kh * kw, M)``."""
    right, below = max(kernel_w - 1 - pad_w, 0), max(kernel_h - 1 - pad_h, 0)
    (padded,) = F.pad(features, (pad_w, right, pad_h, below))
    rows = mask_h_idx + torch.arange(kernel_h, device=features.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=features.device)[:, None]
    data_col.copy_(padded[:, rows, columns].reshape(data_col.shape))


def masked_col2im_forward(
    data_col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    output: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Its results ``(C, M)`` at the given pixels of ``output`` ``(1, C, H, W)``; the others stay as they are."""
    output[0, :, mask_h_idx, mask_w_idx] = data_col
