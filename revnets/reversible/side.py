"""Side information of ops: integers of few bits, packed, and layouts of tensors that are made again."""

import torch
from torch import Tensor, nn


def pack(integers: Tensor, bits: int) -> Tensor:
    """Signed integers of ``bits`` bits each (1, 2 or 4), as many to a byte as it holds; wider ones as they are.

    Example:
        >>> pack(torch.tensor([-1, 0, 1], dtype=torch.int8), 4).shape
        torch.Size([2])
    """
    if bits >= 8:
        return integers
    per, flat = 8 // bits, (integers + 2 ** (bits - 1)).to(torch.uint8).flatten()
    flat = nn.functional.pad(flat, (0, -len(flat) % per)).view(-1, per)
    packed = flat[:, 0].clone()
    for place in range(1, per):
        packed.bitwise_or_(flat[:, place] << (bits * place))
    return packed


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """What ``pack`` was given.

    Args:
        packed: its result.
        bits: as there.
        shape: of the integers.
    """
    if bits >= 8:
        return packed
    mask = 2**bits - 1
    flat = torch.stack([(packed >> (bits * place)) & mask for place in range(8 // bits)], dim=1).flatten()
    return flat[: shape.numel()].view(shape).to(torch.int8).sub_(2 ** (bits - 1))


def layout(x: Tensor) -> tuple[int, ...]:
    """Strides of a tensor, without gaps."""
    return torch.empty_like(x, device="meta").stride()


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor in a layout: kernels may round differently in another."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
