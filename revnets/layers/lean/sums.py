"""Sums per channel of channels-last maps on a CPU, as precise as those of contiguous ones.

torch's kernels for batch norms add up contiguous float32 maps in float64, channels-last ones in float32, pixel after
pixel: errors grow with their number. Here so many pixels in a row stand for one of as many times the channels: the same
kernels, on the same memory, then add up every part for itself, and the few sums are added in float64.
"""

import torch
from torch import Tensor

WIDEST = 4096
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
    mean, var = (t.double().view(parts, -1) for t in torch.batch_norm_update_stats(_widened(x, parts), None, None, 0.0))
    var = var.mean(0) + mean.var(0, correction=0)
    mean = mean.mean(0)
    pixels = x.numel() // x.shape[1]
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (pixels / (pixels - 1))).to(running_var.dtype), momentum)
    return mean.to(x.dtype), var.to(x.dtype)


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
        grad, x = _widened(grad, parts), _widened(x, parts)
        weight, mean, invstd = (t.repeat(parts) for t in (weight, mean, invstd))
    _, *found = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, invstd, True, eps, [False, True, True]
    )
    if parts > 1:
        found = [t.double().view(parts, -1).sum(0).to(t.dtype) for t in found]
    return found[0], found[1]


def _parts(x: Tensor) -> int:
    """How many pixels in a row are taken for one: a power of 2."""
    parts = 1
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if x.device.type == "cpu" and x.dtype == torch.float32 and channels_last:
        pixels, channels = x.numel() // x.shape[1], x.shape[1]
        while pixels and pixels % (4 * parts) == 0 and 2 * parts * channels <= WIDEST:
            parts *= 2
    return parts


def _widened(x: Tensor, parts: int) -> Tensor:
    """The memory of ``x`` as ``(1, parts * C, pixels / parts, 1)``, channels-last."""
    rows = x.permute(0, 2, 3, 1).reshape(1, -1, 1, parts * x.shape[1])
    return rows.permute(0, 3, 1, 2)
