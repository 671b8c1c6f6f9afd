"""What exact mode does to the stream, on CUDA: one launch each, where Triton is there and the maps suit its kernel."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from . import grid
from .operators import implement
from .replay import is_fake
from .tiles import like, suits


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


def max_abs(x: Tensor) -> Tensor:
    """Largest magnitude as a 0-d tensor, in one launch; NaN when there is one."""
    return torch.linalg.vector_norm(x, torch.inf) if x.numel() else x.new_zeros(())


def _launch(x: Tensor, value: Tensor, out: Tensor, constant: float, subtract: bool) -> None:
    if not is_fake(x):
        from .triton import stream

        stream(x, value, out, constant, subtract)


implement("add_rounded", add_rounded)
implement("sub_rounded_", sub_rounded_)
implement("sub_rounded_owned_", sub_rounded_)
implement("max_abs", max_abs)
