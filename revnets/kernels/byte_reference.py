"""What layers of bytes compute, in whole numbers by torch: slow, and equal to the kernel's outputs to the last bit.

Values are bytes ``(N, C / 4, H, W, 4)`` as the kernel has them; what missing channels hold does not matter. Where there
is no kernel, this is what runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import Geometry
from .byte_blocks import fours, from_blocks, reciprocal, to_blocks
from .byte_calls import Finish


def _finished(sums: Tensor, finish: Finish, scale: Tensor, residual: Tensor | None = None) -> Tensor:
    """int64 sums ``(N, C, H, W)`` to bytes, or to floats."""
    t = sums.to(torch.int32).float() * scale.view(1, -1, 1, 1)
    if residual is not None:
        r = (from_blocks(residual, sums.shape[1]).int() - finish.residual_zero).float()
        t = t + r * torch.tensor(finish.residual_scale, dtype=torch.float32)
    if finish.to_float:
        return t.contiguous()  # in the order that the kernel has
    return to_blocks(_bytes(t, finish))


def _bytes(t: Tensor, finish: Finish) -> Tensor:
    """Floats, scaled, to bytes."""
    t = torch.where(t > -512, t, -512.0).clamp(max=512)
    q = (t.round().int() + finish.zero).clamp(min=finish.low).clamp(max=finish.high)
    return q.to(torch.uint8) if finish.table is None else finish.table[q.long()]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    zero_in: int,
    finish: Finish,
    residual: Tensor | None = None,
) -> Tensor:
    """A convolution, depthwise too; ``weight`` is int8 ``(C_out, C_in / groups, kh, kw)``."""
    g = geometry
    pixels = (from_blocks(x, g.in_channels).int() - zero_in).double()  # exact, as all sums are below 2^53
    sums = F.conv2d(pixels, weight.double(), None, g.stride, g.padding, g.dilation, g.groups).long()
    if bias is not None:
        sums = sums + bias.long().view(1, -1, 1, 1)
    return _finished(sums, finish, finish.scale, residual)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, zero_in: int, finish: Finish, residual: Tensor | None = None
) -> Tensor:
    """A linear layer of images of one pixel; ``weight`` is int8 ``(C_out, C_in)``."""
    outputs, inputs = weight.shape
    return conv(x, weight[:, :, None, None], bias, Geometry(inputs, outputs), zero_in, finish, residual)


def mean(x: Tensor, zero_in: int, finish: Finish) -> Tensor:
    """The mean over the pixels."""
    pixels = from_blocks(x)
    sums = (pixels.long() - zero_in).sum((2, 3), keepdim=True)
    return _finished(sums, finish, (finish.scale / (pixels.shape[2] * pixels.shape[3])).expand(sums.shape[1]))


def add(x: Tensor, zero_in: int, finish: Finish, residual: Tensor | None = None) -> Tensor:
    """``x``, or the sum of two, with another scale."""
    pixels = from_blocks(x).long() - zero_in
    return _finished(pixels, finish, finish.scale.expand(pixels.shape[1]), residual)


def scale(x: Tensor, gates: Tensor, zero_in: int, finish: Finish) -> Tensor:
    """Planes times gates."""
    pixels = (from_blocks(x).long() - zero_in) * (from_blocks(gates).long() - finish.residual_zero)
    return _finished(pixels, finish, finish.scale.expand(pixels.shape[1]))


def max_pool(x: Tensor, geometry: Geometry) -> Tensor:
    """The largest pixel under a window."""
    g = geometry
    return to_blocks(F.max_pool2d(from_blocks(x).float(), g.kernel_size, g.stride, g.padding).to(torch.uint8))


def to_bytes(x: Tensor, scale: float, zero: int) -> Tensor:
    """Floats ``(N, C, H, W)`` to bytes."""
    t = F.pad(x * torch.tensor(reciprocal(scale), dtype=torch.float32), (0, 0, 0, 0, 0, fours(x.shape[1]) - x.shape[1]))
    return to_blocks(_bytes(t, Finish(torch.ones(1), zero)))


def from_bytes(x: Tensor, channels: int, scale: float, zero: int) -> Tensor:
    """Bytes to floats ``(N, channels, H, W)``."""
    return (from_blocks(x, channels).int() - zero).float() * torch.tensor(scale, dtype=torch.float32)
