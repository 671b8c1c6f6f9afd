"""Operators that pool the features of regions."""

import torch
import torchvision
from torch import Tensor

from .common import MissingOperatorError, wide


def _average_only(pool_mode: int) -> None:
    if pool_mode != 1:
        raise MissingOperatorError(
            "RoIAlign with pool_mode='max' needs mmcv's compiled extension; without one use pool_mode='avg'"
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Bilinear means over cells of ``rois`` ``(K, 5)``, into ``output`` ``(K, C, h, w)``."""
    _average_only(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(wide(input), rois.to(wide(input).dtype), size, spatial_scale, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The transpose of ``roi_align_forward``, into ``grad_input`` ``(N, C, H, W)``."""
    _average_only(pool_mode)
    grad = wide(grad_output)
    size = (aligned_height, aligned_width, *grad_input.shape)
    kernel = torch.ops.torchvision._roi_align_backward
    grad_input.copy_(kernel(grad, rois.to(grad.dtype), spatial_scale, *size, sampling_ratio, aligned))
