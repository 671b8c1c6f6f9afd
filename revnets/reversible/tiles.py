"""Maps ``(N, C, H, W)`` as kernels of our own see them: samples, channels and pixels, each with one stride."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def suits(*tensors: Tensor) -> bool:
    """Whether the kernels take these maps: a known precision, and no gaps between rows of pixels.

    Example:
        >>> x = torch.zeros(2, 4, 3, 3)
        >>> suits(x, x[:, 1:3]), suits(x[..., 1:]), suits(x.double())
        (True, False, False)
    """
    return all(
        t.dim() == 4
        and t.dtype in DTYPES
        and t.numel() > 0
        and t.shape[0] < 2**16  # the third side of a grid
        and (t.shape[2] == 1 or t.shape[3] == 1 or t.stride(2) == t.shape[3] * t.stride(3))
        for t in tensors
    )


def layout(t: Tensor) -> tuple[int, int, int]:
    """Strides of samples, channels and pixels."""
    return t.stride(0), t.stride(1), t.stride(3) if t.shape[3] > 1 else t.stride(2) if t.shape[2] > 1 else 1


def sizes(t: Tensor) -> tuple[int, int]:
    """Channels and pixels."""
    return t.shape[1], t.shape[2] * t.shape[3]


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty map without gaps, channels-last where ``x`` is."""
    channels_last = x.stride(1) == 1
    return torch.empty_like(
        x, dtype=dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def blocks(t: Tensor) -> dict[str, int]:
    """A tile whose fast direction is the one that lies together in memory."""
    return {"BLOCK_C": 32, "BLOCK_P": 32} if layout(t)[1] == 1 else {"BLOCK_C": 2, "BLOCK_P": 512}


def row_blocks(t: Tensor, pixels: str = "BLOCK_R", large: bool = False) -> dict[str, int]:
    """A tile of channels and rows, which are the pixels of all samples.

    Args:
        t: the map.
        pixels: what the side of the rows is called.
        large: whether several programs share the rows of a channel; else few channels make for many programs.
    """
    most = (32, 64) if large else (8, 256)
    block_c, rows = most if layout(t)[1] == 1 else (2, 512)
    return {"BLOCK_C": block_c, pixels: min(rows, max(16, power_of_2(t.shape[0] * t.shape[2] * t.shape[3])))}


def power_of_2(number: int) -> int:
    """The next one that is no less.

    Example:
        >>> [power_of_2(n) for n in (1, 2, 3, 17)]
        [1, 2, 4, 32]
    """
    return 1 << (number - 1).bit_length()


def loops(t: Tensor, block_p: int, at_most: int | None = None) -> int:
    """Tiles of pixels that one program goes through: all, or ``at_most`` so many."""
    tiles = -(-t.shape[2] * t.shape[3] // block_p)
    return tiles if at_most is None else min(tiles, at_most)


def grid(t: Tensor, block: dict[str, int], steps: int = 1) -> tuple[int, int, int]:
    """Programs for tiles of pixels, of channels, and samples."""
    n, c, h, w = t.shape
    return -(-h * w // (block["BLOCK_P"] * steps)), -(-c // block["BLOCK_C"]), n


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Within, Triton launches on this device: it takes the current one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
