"""The little that masks need of other processes; without them, everything stays as it is."""

import torch
import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether there are other processes.

    Example:
        >>> several()
        False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """The tensor of the first process, by way of ``device`` where the processes cannot exchange it where it is."""
    if not several():
        return tensor
    sent = tensor.to(device or tensor.device, torch.uint8, copy=True)
    dist.broadcast(sent, src=0)
    return sent.to(tensor.device, tensor.dtype)


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same to the bit in each."""
    if several():
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor)
    return tensor
