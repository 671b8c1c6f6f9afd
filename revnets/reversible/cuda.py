"""What exact mode does to the stream, on CUDA: one launch each, where Triton is there and the maps suit its kernel."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import grid
from .operators import implement
from .replay import is_fake
from .tiles import blocks, layout, like, on, sizes, suits
from .tiles import grid as programs_of

WATCHERS: list[Callable[[str], None]] = []
"""Who wants to know of every launch, by the kernel's name: of fake tensors as well, whose kernels are not run."""
AT_ONCE = 4  # maps whose largest magnitudes one launch finds
PARTS = 32  # programs for each of them


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def usable(*tensors: Tensor) -> bool:
    """Whether kernels in Triton take these maps; fake ones stand for a machine that has Triton."""
    return suits(*tensors) and (is_fake(tensors[0]) or has_triton())


def add_rounded(x: Tensor, value: Tensor, constant: float) -> Tensor:
    """``grid.add_rounded_in_a_row`` in one launch where it suits."""
    if not (usable(x, value) and x.dtype == torch.float32):
        return grid.add_rounded_in_a_row(x, value, constant)
    out = like(x)
    _launch(x, value, out, constant, subtract=False)
    return out


def sub_rounded_(x: Tensor, value: Tensor, constant: float) -> None:
    """``grid.sub_rounded_in_a_row`` in one launch where it suits."""
    if not (usable(x, value) and x.dtype == torch.float32):
        return grid.sub_rounded_in_a_row(x, value, constant)
    _launch(x, value, x, constant, subtract=True)


def max_abs(xs: Sequence[Tensor]) -> Tensor:
    """``grid.max_abs_of_each`` by parts, ``(len(xs), PARTS)``, in one launch for a few maps where it suits."""
    if not all(usable(x) and x.dtype == torch.float32 and _is_dense(x) for x in xs):
        found = [torch.linalg.vector_norm(x, torch.inf) if x.numel() else x.new_zeros(()) for x in xs]
        return torch.stack(found)[:, None]
    parts = xs[0].new_empty(len(xs), PARTS)
    for first in range(0, len(xs), AT_ONCE):
        some = xs[first : first + AT_ONCE]
        filled = [*some, *[some[0]] * (AT_ONCE - len(some))]
        arguments = (parts[first:], *filled, *(x.numel() for x in filled))
        launch(f"{__package__}.triton", "max_abs_kernel", (PARTS, len(some)), *arguments, PARTS=PARTS, BLOCK=1024)
    return parts


def _is_dense(x: Tensor) -> bool:
    return torch.ops.aten.is_non_overlapping_and_dense(x)


def launch(module: str, kernel: str, programs: Sequence[int], *arguments: Any, **flags: Any) -> None:
    """Start a kernel in Triton, but for fake tensors.

    Args:
        module: its name, imported on first use: it imports Triton.
        kernel: its name in there.
        programs: how many, in each direction.
        arguments: the first is a tensor, which says where it runs.
        flags: constants that it is compiled for.
    """
    for watcher in WATCHERS:
        watcher(kernel)
    first: Tensor = arguments[0]
    if not is_fake(first):
        function = getattr(importlib.import_module(module), kernel)
        with on(first.device):
            function[tuple(programs)](*arguments, **flags)


def _launch(x: Tensor, value: Tensor, out: Tensor, constant: float, subtract: bool) -> None:
    block = blocks(x)
    numbers = (constant, *sizes(x), *layout(x), *layout(value), *layout(out))
    flags = {"SUBTRACT": subtract, **block}
    launch(f"{__package__}.triton", "stream_kernel", programs_of(x, block), x, value, out, *numbers, **flags)


implement("add_rounded", add_rounded)
implement("sub_rounded_", sub_rounded_)
implement("sub_rounded_owned_", sub_rounded_)
implement("max_abs", max_abs)
