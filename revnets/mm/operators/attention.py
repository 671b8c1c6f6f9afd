"""The masks of point-wise spatial attention (PSANet), which mmsegmentation's ``PSAHead`` is made of."""

import torch
from torch import Tensor

COLLECT = 0
"""``psa_type`` by which each pixel gathers from others; 1: it gives to them."""


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    r"""Weights by offset as weights by position, into ``output``; what lies outside of a mask is 0.

    .. math:: y_{q, p} = m_{(q - p) + r, \, p} \quad \text{(collect)}, \qquad
        y_{p, q} = m_{(q - p) + r, \, p} \quad \text{(distribute)}

    Args:
        input: m, ``(N, h_mask * w_mask, H, W)``.
        output: y, ``(N, H * W, H, W)``.
        psa_type: 0 collects, 1 distributes.
        num_: N.
        h_feature: H.
        w_feature: W.
        h_mask: rows of a mask.
        w_mask: its columns.
        half_h_mask: r, in rows.
        half_w_mask: and in columns.
    """
    offsets, inside = _offsets(input, h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask)
    masks = input.flatten(2)
    placed = masks.gather(1, offsets.expand(num_, -1, -1)).masked_fill(~inside, 0)
    output.copy_((placed if psa_type == COLLECT else placed.mT).reshape(output.shape))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Its gradient, into ``grad_input``: each weight's from the one place that it went to."""
    offsets, inside = _offsets(grad_output, h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask)
    placed = grad_output.reshape(num_, h_feature * w_feature, h_feature * w_feature)
    placed = (placed if psa_type == COLLECT else placed.mT).masked_fill(~inside, 0)
    grad_input.zero_().flatten(2).scatter_add_(1, offsets.expand(num_, -1, -1), placed)


def _offsets(
    like: Tensor, height: int, width: int, h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int
) -> tuple[Tensor, Tensor]:
    """Which weight of pixel p is about pixel q, ``(1, q, p)``, and whether its mask reaches as far."""
    at = torch.arange(height * width, device=like.device)
    rows = (at // width)[:, None] - at // width + half_h_mask
    columns = (at % width)[:, None] - at % width + half_w_mask
    inside = (rows >= 0) & (rows < h_mask) & (columns >= 0) & (columns < w_mask)
    return torch.where(inside, rows * w_mask + columns, 0)[None], inside
