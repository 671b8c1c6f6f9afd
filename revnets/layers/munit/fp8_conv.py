"""FP8 convolutions: who computes one, decided here alone; and those of Triton, with their gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from .fp8 import ALIGNMENT, E4M3, E5M2, _count, resolve_backend
from .fp8_conv_ops import (
    Geometry,
    conv_input_gradient,
    conv_output,
    conv_weight_gradient,
    flattened,
    fp8_maps,
    output_size,
    wrong,
)

LEAST_CAPABILITY = (8, 9)
"""Compute capability from which on NVIDIA's GPUs have FP8 units: Ada; Hopper is 9.0."""

MAXIMUM = 2**30
"""Pixels that a batch may have, on either side of a convolution: kernels count them in 32 bits."""


# --- who computes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What computes a convolution, and why.

    Attributes:
        how: ``"plain"`` (not quantised), ``"scaled_mm"`` (torch's product of FP8 matrices), ``"triton"`` or
            ``"emulate"`` (quantised operands in float32).
        reason: in words, for reports.
    """

    how: str
    reason: str


def choose(
    weight: Sequence[int],
    padding: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    groups: int = 1,
    backend: str | None = None,
    pointwise: str = "scaled_mm",
    quiet: bool = False,
) -> Choice:
    """What computes an FP8 convolution on a device: the one place that decides.

    Args:
        weight: its shape, ``(outputs, C / groups, k, k)``.
        padding: down and right.
        device: of the operands.
        dtype: of the result.
        groups: of the convolution.
        backend: ``"scaled_mm"`` for FP8 units and an error where there are none, ``"emulate"``, or None for the best.
        pointwise: what computes 1x1 convolutions without padding, of ``"scaled_mm"`` and ``"triton"``, if both can.
        quiet: do not warn of emulation.

    Raises:
        ValueError: for an unknown backend.
        RuntimeError: for ``"scaled_mm"`` on a device that multiplies no FP8.

    Example:
        >>> choose((64, 1, 3, 3), (1, 1), torch.device("cuda"), groups=64)
        Choice(how='plain', reason='grouped convolutions are not quantised')
        >>> choose((64, 64, 3, 3), (1, 1), torch.device("cpu"), backend="emulate").how
        'emulate'
    """
    if groups != 1:
        return Choice("plain", "grouped convolutions are not quantised")
    found = resolve_backend(backend, device, dtype, quiet)
    if found == "emulate":
        asked = "asked for" if backend == "emulate" else "float64" if dtype == torch.float64 else "no FP8 units"
        return Choice("emulate", asked if asked != "no FP8 units" else f"the {device.type} device has {asked}")
    one = tuple(weight[2:]) == (1, 1) and not any(padding)
    if one and pointwise == "scaled_mm":
        return Choice("scaled_mm", "1x1: a product of matrices")
    problem = kernel_problem(device.type, device.index, quiet)
    if problem is None:
        return Choice("triton", "1x1: faster than scaled_mm by the table" if one else "by the Triton kernel")
    return Choice("scaled_mm", "1x1: a product of matrices") if one else Choice("emulate", problem)


@torch.compiler.assume_constant_result
def kernel_problem(kind: str, index: int | None, quiet: bool = True) -> str | None:
    """Why the Triton kernels do not serve a device, None if they do; a GPU that should be served is warned of, once.

    Args:
        kind: of device: ``"cuda"``, or ``"cpu"``, which Triton's interpreter serves.
        index: of the device.
        quiet: do not warn.
    """
    problem = _problem(kind, index)
    if problem is not None and kind == "cuda" and not quiet:
        _warn_of_problem(problem)
    return problem


@cache
def _warn_of_problem(problem: str) -> None:
    warnings.warn(f"FP8 convolutions other than 1x1 are emulated, so slowly: {problem}", stacklevel=2)


@cache
def _problem(kind: str, index: int | None) -> str | None:
    try:
        if kind == "cuda" and (found := _too_old(index)) is not None:
            return found
        from .fp8_conv_triton import interpreted

        if kind != "cuda" and not (kind == "cpu" and interpreted()):
            return f"the kernels are for CUDA devices, not for {kind}"
        with _disable_current_modes():
            return wrong(torch.device(kind) if index is None else torch.device(kind, index))
    except ImportError:
        return "Triton is not installed"
    except Exception as error:  # whatever a compiler on a user's machine may raise
        return str(error).strip().split("\n")[0] or type(error).__name__


def _too_old(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    least, here = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
    return f"FP8 units came with compute capability {least}, this device has {here}"


def can_convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels take such an operand: not an empty one, nor one of more than ``MAXIMUM`` pixels.

    The others are emulated, which also says what is wrong with a map that is smaller than the kernel.
    """
    n, _, *size = x.shape
    out = output_size(size, weight.shape[2:], *geometry)
    return bool(x.numel()) and min(out) > 0 and n * max(size[0] * size[1], out[0] * out[1]) <= MAXIMUM


def padded_words(channels_in: int, channels_out: int) -> str:
    """What is padded of a layer's channels, in words; empty if nothing is.

    Example:
        >>> padded_words(24, 40), padded_words(16, 32)
        ('channels 24 to 40 padded to 32 to 48', '')
    """
    wide_in, wide_out = (-(-c // ALIGNMENT) * ALIGNMENT for c in (channels_in, channels_out))
    if (wide_in, wide_out) == (channels_in, channels_out):
        return ""
    return f"channels {channels_in} to {channels_out} padded to {wide_in} to {wide_out}"


# --- the convolution -------------------------------------------------------------------------------------------------


def fp8_conv2d(
    x: Tensor, weight: Tensor, scale: float, grad_scale: float, dtype: torch.dtype, geometry: Geometry
) -> Tensor:
    r""":math:`s\, q(x) * q(W)`, with the gradients of ``functional``, all three products on FP8 units by Triton.

    Inputs that are not channels-last are brought there by the cast, which reads them in any case; what is returned, and
    the gradient, have the layout of ``x``. Kept for the backward pass: the quantised operands, a byte a number.

    Args:
        x: ``(N, C, H, W)``, not empty.
        weight: ``(outputs, C, k, k)``.
        scale: s.
        grad_scale: static factor around the quantisation of gradients.
        dtype: of the result.
        geometry: stride, padding, dilation.
    """
    return _Conv2d.apply(x, weight, (scale, grad_scale), dtype, flattened(geometry), torch.is_grad_enabled())


class _Conv2d(torch.autograd.Function):
    """Keeps the quantised operands that gradients need: the weight transposed, as its last product wants it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scales: tuple[float, float],
        dtype: torch.dtype,
        flat: list[int],
        trains: bool,
    ) -> Tensor:
        (scale, grad_scale), last = scales, _channels_last(x)
        maps, taps = fp8_maps(x, E4M3, 1.0), fp8_maps(weight, E4M3, 1.0)
        kind = "triton, padded" if padded_words(weight.shape[1], weight.shape[0]) else "triton"
        _count(kind)
        if trains:
            for_x, for_weight = ctx.needs_input_grad[:2]
            ctx.save_for_backward(
                fp8_maps(weight.transpose(0, 1), E4M3, 1.0) if for_x else None, maps if for_weight else None
            )
            formats = (list(x.shape), x.dtype, last), (list(weight.shape), weight.dtype, _channels_last(weight))
            ctx.settings = (scale / grad_scale, grad_scale, flat, kind, *formats)
        return conv_output(maps, taps, flat, scale, dtype, last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        taps, maps = ctx.saved_tensors
        scale, grad_scale, flat, kind, for_x, for_weight = ctx.settings
        grads = fp8_maps(grad, E5M2, grad_scale)
        grad_x = grad_weight = None
        if taps is not None:
            _count(kind)
            grad_x = conv_input_gradient(grads, taps, flat, scale, *for_x)
        if maps is not None:
            _count(kind)
            grad_weight = conv_weight_gradient(grads, maps, flat, scale, *for_weight)
        return grad_x, grad_weight, None, None, None, None


def _channels_last(x: Tensor) -> bool:
    """By the strides, as weights of 1x1 kernels are contiguous either way."""
    return x.stride(1) == 1 and x.stride(3) != 1
