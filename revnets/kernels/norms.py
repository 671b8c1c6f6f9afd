"""Batch norm with its activation on the kernel, in training: see ``norms.h``. Threads do not change a bit."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .build import ACTIVATIONS, NormStruct, load_kernel
from .layouts import by_pixel, pixels
from .operands import call, pointing, readable
from .training import serves

STATISTICS, PLANE_SUMS, NORMED, AFFINE_SUMS, GRADIENT = 1, 2, 4, 8, 16
"""``NormWork`` of ``norms.h``."""
NAMES = {"": "none", **{name: name for name in ("relu", "relu6", "hardswish", "silu")}}
"""Activations that the kernel has derivatives of, as lean layers and as the kernel call them."""
_NUMBERS = {name: ACTIVATIONS.index(there) for name, there in NAMES.items()}


class Norm(NamedTuple):
    """A batch norm and its activation, with the statistics of the batch: of ``act(norm(x))``.

    Attributes:
        x: ``(N, C, H, W)``, contiguous or channels last.
        weight: ``(C,)``.
        bias: likewise.
        mean: of x, likewise.
        var: likewise, biased.
        eps: added to it.
        act: name of a lean layer's activation; the kernel has those of ``NAMES``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float
    act: str


def norm_serves(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernel computes this norm: plain float32 on the CPU, nothing that looks on, maps without gaps."""
    if type(x) is not Tensor or x.dim() != 4 or weight is None or bias is None or not x.numel():
        return False
    whole = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return whole and serves(x, weight, bias)


def measured(x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str) -> tuple[Norm, Tensor]:
    """A norm with the batch's statistics, and ``act(norm(x))``, laid out as x.

    Example:
        >>> norm, y = measured(torch.arange(8.0).view(2, 1, 2, 2), torch.ones(1), torch.ones(1), 0.0, "relu")
        >>> norm.mean, norm.var, y.min()
        (tensor([3.5000]), tensor([5.2500]), tensor(0.))
    """
    norm, y = _unmeasured(x, weight, bias, eps, act), torch.empty_like(x)
    _run(STATISTICS | NORMED, norm, y=y)
    return norm, y


def measured_means(x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str) -> tuple[Norm, Tensor]:
    """A norm with the batch's statistics, and means of ``act(norm(x))`` over the pixels, ``(N, C)``."""
    norm, means = _unmeasured(x, weight, bias, eps, act), x.new_empty(x.shape[:2])
    _run(STATISTICS | PLANE_SUMS, norm, planes=means)
    return norm, means


def normed(norm: Norm, gates: Tensor | None = None) -> Tensor:
    """``act(norm(x))``, times gates ``(N, C)`` if there are any, laid out as x."""
    y = torch.empty_like(norm.x)
    _run(NORMED, norm, gates=gates, y=y)
    return y


def plane_sums(norm: Norm, grad: Tensor) -> Tensor:
    """Sums over the pixels of each plane of ``act(norm(x))`` times a gradient, ``(N, C)``."""
    sums = norm.x.new_empty(norm.x.shape[:2])
    _run(PLANE_SUMS, norm, dy=alike(grad, norm.x), planes=sums)
    return sums


def grads(
    grad: Tensor,
    norm: Norm,
    of_x: bool = True,
    gates: Tensor | None = None,
    more: Tensor | None = None,
    owned: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x, weight and bias.

    Args:
        grad: times the gates, plus more, it is the gradient of ``act(norm(x))``.
        norm: with the statistics of x.
        of_x: whether that of x is needed.
        gates: ``(N, C)``, or None.
        more: likewise.
        owned: whether the gradient of x may take the place of ``grad``.
    """
    x, dy = norm.x, alike(grad, norm.x)
    of_weight, of_bias = x.new_empty(2, x.shape[1])
    dx = None if not of_x else dy if owned or dy is not grad else torch.empty_like(x)
    work = AFFINE_SUMS | GRADIENT if of_x else AFFINE_SUMS
    _run(work, norm, dy, gates, more, of_weight, of_bias, y=dx)
    return dx, of_weight, of_bias


def alike(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient laid out as x: itself where the kernel can read it, or else a copy of its own.

    Raises:
        ValueError: for another shape or type.
    """
    if grad.shape != x.shape:
        raise ValueError(f"gradient of shape {tuple(grad.shape)}: expected {tuple(x.shape)}")
    last = by_pixel(x)
    found = grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    given = pixels(found) if last else found
    kept = readable("gradient", given)
    if kept is given:
        return found
    return kept.permute(0, 3, 1, 2) if last else kept


def _unmeasured(x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str) -> Norm:
    mean, var = x.new_empty(2, x.shape[1])
    return Norm(x, weight, bias, mean, var, eps, act)


def _run(
    work: int,
    norm: Norm,
    dy: Tensor | None = None,
    gates: Tensor | None = None,
    more: Tensor | None = None,
    of_weight: Tensor | None = None,
    of_bias: Tensor | None = None,
    planes: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Of ``dy`` and ``y``, the layout is that of x."""
    x, weight, bias, mean, var, eps, act = norm
    (n, channels, height, width), last = x.shape, by_pixel(x)
    few = n * channels
    if last:
        x, dy, y = pixels(x), None if dy is None else pixels(dy), None if y is None else pixels(y)
    tensors = (
        readable("input", x),
        dy,
        readable("weight", weight, numel=channels),
        readable("bias", bias, numel=channels),
        None if gates is None else readable("gates", gates, numel=few),
        None if more is None else readable("gradient of the means", more, numel=few),
        *(mean, var, of_weight, of_bias, planes, y),
    )
    struct = pointing(NormStruct, tensors, n, channels, height * width, last, _NUMBERS[act], eps)
    call(load_kernel().revnets_norm, ctypes.byref(struct), work, torch.get_num_threads())
