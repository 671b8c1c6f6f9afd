"""Tensors as the kernel reads them. Their addresses are taken here and nowhere else in the package.

The kernel sees bare memory: whatever reaches it is checked and made contiguous by ``readable``, and is pointed at by
``call``, ``pointing`` or ``aim``, which hold what they point at. So nobody points at a copy that is gone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_Struct = TypeVar("_Struct", bound=ctypes.Structure)
OPERANDS = ("input", "residual", "gates")  # what callers compute, unlike weights, and may convert


def readable(name: str, tensor: Tensor, dtype: torch.dtype = torch.float32, numel: int | None = None) -> Tensor:
    """The tensor, contiguous; itself where it is that already.

    Args:
        name: for messages.
        tensor: any.
        dtype: that the kernel expects.
        numel: of how many numbers it has to be.

    Raises:
        ValueError: for a tensor of another type, size, layout or device, or without memory.

    Example:
        >>> readable("input", torch.arange(6.0)[::2]).is_contiguous()
        True
    """
    if tensor.dtype is not dtype or not tensor.is_cpu or tensor.layout is not torch.strided:
        layout = "" if tensor.layout is torch.strided else f", {tensor.layout}"
        advice = "; convert it by .float().cpu()" if name in OPERANDS and not layout else ""
        raise ValueError(f"{name} of {tensor.dtype} on {tensor.device}{layout}: expected {dtype} on cpu{advice}")
    numbers = tensor.numel()
    if numel is not None and numbers != numel:
        raise ValueError(f"{name} of {numbers} numbers: expected {numel}")
    if not tensor.is_contiguous() or tensor.is_neg():
        return _copied(name, tensor)
    # a storage can be freed or cut under a tensor, which torch finds out as little as the kernel
    if tensor.untyped_storage().nbytes() < (tensor.storage_offset() + numbers) * dtype.itemsize and numbers:
        return _copied(name, tensor)
    return tensor


def _copied(name: str, tensor: Tensor) -> Tensor:
    """A contiguous tensor of the same numbers, if they are there."""
    if tensor._is_zerotensor():  # zeros without memory, which automatic differentiation makes
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
    if tensor.numel() and tensor.untyped_storage().nbytes() < needed:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} without memory: its storage was freed or made smaller")
    return tensor.resolve_neg().contiguous()


def address(tensor: Tensor) -> int:
    """Where a contiguous tensor lies. Whoever asks must keep the tensor."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    return tensor.data_ptr()


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function of the kernel, with tensors where it takes addresses: they are held until it returns."""
    return function(*[address(a) if isinstance(a, Tensor) else a for a in arguments])


def pointing(kind: type[_Struct], tensors: Sequence[Tensor | None], /, *numbers: float, **more: int) -> _Struct:
    """A struct whose first fields are the addresses of tensors, which it holds.

    Args:
        kind: its class.
        tensors: None for none.
        numbers: the fields behind them.
        more: fields by name.
    """
    struct = kind(*[None if t is None else address(t) for t in tensors], *numbers, **more)
    struct.held = tensors
    return struct


def aim(structs: Any, places: Sequence[tuple[int, str, int, int]], tensors: Sequence[Tensor]) -> None:
    """Fields of an array of structs at tensors, which the caller has to hold as long as the kernel may run.

    Args:
        structs: the array.
        places: of which struct, its field, which of the tensors, how many bytes behind its first number.
        tensors: contiguous.
    """
    addresses = [address(tensor) for tensor in tensors]
    for at, name, number, offset in places:
        setattr(structs[at], name, addresses[number] + offset)
