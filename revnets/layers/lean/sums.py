"""Sums per channel of channels-last maps on a CPU, as precise as those of contiguous ones.

torch's kernels for batch norms add up contiguous float32 maps in float64, channels-last ones in float32, one pixel
after the other: errors grow with the pixels. Here so many pixels in a row stand for one of as many times the channels:
the same kernels, on the same memory, then add up every part for itself, and the few sums are added in the end.
"""

import torch
from torch import Tensor

FEW = 1024
"""Pixels of a map that is left to torch's kernel: the error is small, and so is the map."""
PART = 128
"""Pixels of a part, or up to twice as many, if ``WIDEST`` allows."""
WIDEST = 2048
"""Sums at a time: they stay in the fastest cache."""


def batch_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` of ``x`` over all but the channels; the running ones move.

    Example:
        >>> x = torch.arange(8.0).view(2, 1, 2, 2)
        >>> batch_statistics(x, torch.zeros(1), torch.ones(1), momentum=1.0)
        (tensor([3.5000]), tensor([5.2500]))
    """
    parts = _parts(x)
    if parts == 1:
        return torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
    means, variances = torch.batch_norm_update_stats(_widened(x, parts), None, None, 0.0)
    between, mean = torch.var_mean(means.view(parts, -1), 0, correction=0)
    var = between.add_(variances.view(parts, -1).mean(0))
    pixels = x.numel() // x.shape[1]
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (pixels / (pixels - 1))).to(running_var.dtype), momentum)
    return mean, var


def affine_grads(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a batch norm in training, from that of its value.

    Args:
        grad: ``(N, C, H, W)``, of the type of all others.
        x: input, likewise.
        weight: ``(C,)``.
        mean: of the batch, ``(C,)``.
        invstd: likewise, one over the deviation.
        eps: that is in it.
    """
    parts = min(_parts(grad), _parts(x))
    if parts > 1:
        grad, x, mean, invstd = _widened(grad, parts), _widened(x, parts), mean.repeat(parts), invstd.repeat(parts)
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight if parts == 1 else None, None, None, mean, invstd, True, eps, [False, True, True]
    )
    if parts > 1:
        of_weight, of_bias = of_weight.view(parts, -1).sum(0), of_bias.view(parts, -1).sum(0)
    return of_weight, of_bias


def _parts(x: Tensor) -> int:
    """How many pixels in a row are taken for one: a power of 2."""
    parts, pixels = 1, x.numel() // max(1, x.shape[1])
    if pixels <= FEW or x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 4 or x.is_contiguous():
        return parts
    if x.is_contiguous(memory_format=torch.channels_last):
        while pixels > 2 * PART * parts and pixels % (2 * parts) == 0 and 2 * parts * x.shape[1] <= WIDEST:
            parts *= 2
    return parts


def _widened(x: Tensor, parts: int) -> Tensor:
    """The memory of ``x`` as ``(1, parts * C, pixels / parts, 1)``, channels-last."""
    wide = parts * x.shape[1]
    return x.as_strided((1, wide, x.numel() // wide, 1), (x.numel(), 1, wide, wide))
