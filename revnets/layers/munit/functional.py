r"""Munit-scaled linear layers and convolutions as functions, in FP8 or in the usual precision (arXiv 2502.05967).

With :math:`\alpha` the static scale and q(.) quantisation (to e4m3 for inputs and weights, e5m2 for gradients),

.. math:: y = \alpha \, q(x) q(W)^\top, \qquad
    \partial x = \alpha \, q(\partial y) q(W), \qquad \partial W = \alpha \, q(\partial y)^\top q(x)

which is plain calculus of the scaled product, with quantisation passed straight through. Gradients are quantised as
:math:`q(\gamma \, \partial y) / \gamma` with a static :math:`\gamma` (ours, not the paper's), see ``GRAD_SCALE``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fp8 import (
    E4M3,
    E5M2,
    _count,
    check_floating,
    fp8_matmul,
    quantize,
    quantize_both,
    resolve_backend,
    without_autocast,
)
from .fp8_conv import can_convolve, choose, fp8_conv2d
from .fp8_conv_ops import Geometry

Ints = int | Sequence[int]
ROLES = ("input", "hidden", "output")
GRAD_SCALE = 2.0**14
"""What gradients are multiplied by before they become e5m2, and divided by after the product; see ``gradient_scale``.

With a loss that is a mean over images, many gradients of vision networks lie below the smallest number of e5m2, 1.5e-5:
of a new RevBiFPN-S0 on 128 images of CIFAR-10 at 32 pixels, 1, 2^10 and 2^14 flush 54%, 1.4% and 0.1% of them (in the
worst layer 100%, 12% and 1.4%), of ResNet-18 13%, 0.2% and 0.01%, and none is clipped, not even by 2^20. With 2^14 the
range is 9e-10 to 3.5, which clips 0.05% of gradients of unit variance: for a loss scaled up to have such, give 1.
"""


def gradient_scale(grad_scale: float | None, dtype: torch.dtype) -> float:
    """The static factor around the quantisation of gradients: the one asked for, or what suits their precision.

    float16 gradients are under a loss scaler, which keeps them within the range of float16: that of e5m2, too. A second
    factor would clip the largest, and the scaler would not notice. A loss scaler over other gradients is the user's
    choice, and wants ``grad_scale=1``.

    Example:
        >>> gradient_scale(None, torch.bfloat16), gradient_scale(None, torch.float16)
        (16384.0, 1.0)
    """
    if grad_scale is not None:
        return grad_scale
    return 1.0 if dtype == torch.float16 else GRAD_SCALE


def munit_scale(fan_in: float, role: str = "hidden") -> float:
    r"""The static factor :math:`\alpha` of a layer whose weights have variance 1.

    .. math:: \alpha_{hidden} = 1/\sqrt{\text{fan\_in}}, \qquad \alpha_{output} = 1/\text{fan\_in}, \qquad
        \alpha_{input} = 1

    Args:
        fan_in: weights per output number: ``in_features``, or ``in_channels / groups * k * k``; under a mask, the mean
            of those that stay.
        role: ``"input"``, ``"hidden"`` or ``"output"``.

    Raises:
        ValueError: for another role.

    Example:
        >>> munit_scale(64), munit_scale(64, "output"), munit_scale(64, "input")
        (0.125, 0.015625, 1.0)
    """
    if role not in ROLES:
        raise ValueError(f"role={role!r}: expected one of {', '.join(ROLES)}")
    fan_in = max(fan_in, 1.0)
    return {"input": 1.0, "hidden": fan_in**-0.5, "output": 1 / fan_in}[role]


def mus_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    fp8: bool = False,
    backend: str | None = None,
    grad_scale: float | None = None,
) -> Tensor:
    r""":math:`y = \alpha x W^\top + b`, all three products of training in FP8 on request.

    The result has autocast's dtype, else that of ``x``. FP8 keeps the quantised input for the backward pass, a byte
    per number. Second derivatives of FP8 are refused. Infinite gradients are clipped like others, so a loss scaler
    sees an overflow only in gradients that are not quantised, such as those of biases and norms.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)``, in the precision of the result.
        scale: :math:`\alpha`, see ``munit_scale``.
        fp8: quantise the operands.
        backend: of FP8 products: ``"scaled_mm"``, ``"emulate"``, or None for the best on the device.
        grad_scale: static factor around the quantisation of gradients, a power of two; None: see ``gradient_scale``.

    Returns:
        ``(..., out_features)``.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for an unknown backend, or shapes that do not match.

    Example:
        >>> x, weight = torch.ones(2, 5, 16), torch.ones(8, 16)
        >>> y = mus_linear(x, weight, scale=0.25, fp8=True, backend="emulate")
        >>> y.shape, y[0, 0, 0].item()
        (torch.Size([2, 5, 8]), 4.0)
    """
    check_floating(x, "mus_linear")
    if not fp8:
        return F.linear(x, weight * scale, bias)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"mus_linear: input of shape {tuple(x.shape)} for a weight of shape {tuple(weight.shape)}: "
            f"expected (..., {weight.shape[1]})"
        )
    dtype = _result_dtype(x)
    backend, gamma = resolve_backend(backend, x.device, dtype), gradient_scale(grad_scale, dtype)
    y = _Linear.apply(x, weight, scale, backend, dtype, False, gamma, torch.is_grad_enabled())
    return y if bias is None else y + bias.to(dtype)


def mus_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    scale: float,
    fp8: bool = False,
    backend: str | None = None,
    grad_scale: float | None = None,
    pointwise: str = "scaled_mm",
) -> Tensor:
    r""":math:`y = \alpha W * x + b`, all three products of training in FP8 on request.

    A 1x1 convolution without padding is a product of matrices of ``N H W`` rows; larger kernels are computed by ours in
    Triton on NVIDIA's GPUs from compute capability 8.9 on, elsewhere in float32 from quantised operands; see
    ``munit.fp8_conv.choose``. Grouped convolutions, depthwise ones among them, are scaled but never quantised: they
    keep autocast's precision. The result keeps the input's memory format; channels-last is the fast one.

    Args:
        x: ``(N, C_in, H, W)``.
        weight: ``(C_out, C_in / groups, k, k)``.
        bias: ``(C_out,)``.
        stride: as in ``F.conv2d``.
        padding: as in ``F.conv2d``, numbers only.
        dilation: as in ``F.conv2d``.
        groups: as in ``F.conv2d``.
        scale: :math:`\alpha`, see ``munit_scale``.
        fp8: quantise the operands, unless grouped.
        backend: as in ``mus_linear``; ``"scaled_mm"`` stands for FP8 units by whatever product.
        grad_scale: as in ``mus_linear``.
        pointwise: what computes 1x1 convolutions on FP8 units: ``"scaled_mm"``, or ``"triton"`` where it can.

    Returns:
        ``(N, C_out, H', W')``.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for an unknown backend, or shapes that do not match.

    Example:
        >>> x, weight = torch.ones(2, 16, 6, 6), torch.ones(8, 16, 3, 3)
        >>> mus_conv2d(x, weight, padding=1, scale=1 / 12, fp8=True, backend="emulate").shape
        torch.Size([2, 8, 6, 6])
    """
    check_floating(x, "mus_conv2d")
    dtype, geometry = _result_dtype(x), (_pair(stride), _pair(padding), _pair(dilation))
    options: dict[str, Any] = {"groups": groups, "backend": backend, "pointwise": pointwise}
    how = choose(weight.shape, geometry[1], x.device, dtype, **options).how if fp8 else "plain"
    if how == "plain":
        return F.conv2d(x, weight * scale, bias, stride, padding, dilation, groups)
    y = _fp8_conv2d(how, x, weight, (scale, gradient_scale(grad_scale, dtype)), dtype, geometry)
    return y if bias is None else y + bias.to(dtype)[:, None, None]


def _fp8_conv2d(
    how: str, x: Tensor, weight: Tensor, scales: tuple[float, float], dtype: torch.dtype, geometry: Geometry
) -> Tensor:
    """By what was chosen; what the kernels do not take is emulated."""
    if x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"mus_conv2d: input of shape {tuple(x.shape)} for a weight of shape {tuple(weight.shape)}: "
            f"expected (N, {weight.shape[1]}, H, W)"
        )
    if how == "triton" and can_convolve(x, weight, geometry):
        return fp8_conv2d(x, weight, *scales, dtype, geometry)
    if how == "scaled_mm":
        (down, right), last = geometry[0], x.stride(1) == 1
        if (down, right) != (1, 1):
            x = x[:, :, ::down, ::right].contiguous(
                memory_format=torch.channels_last if last else torch.contiguous_format
            )
        scale, gamma = scales
        return _Linear.apply(x, weight.flatten(1), scale, how, dtype, True, gamma, torch.is_grad_enabled())
    return _Conv2d.apply(x, weight, scales, dtype, geometry)


def _result_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    usable = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if usable else x.dtype


def _pair(value: Ints) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class _Linear(torch.autograd.Function):
    """Over the last dimension, or over the channels of maps; keeps the quantised operands, as the backward pass needs
    them: transposed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: float,
        backend: str,
        dtype: torch.dtype,
        maps: bool,
        grad_scale: float,
        trains: bool,
    ) -> Tensor:
        if trains:
            rows, columns = _quantized_rows(x, maps, E4M3, 1.0, backend)
            quantized, transposed = quantize_both(weight, E4M3, 1.0, backend)
            ctx.save_for_backward(columns, transposed)
        else:
            rows, quantized = _rows(quantize(x, E4M3), maps), quantize(weight, E4M3)
        last = maps and x.stride(1) == 1
        ctx.settings = (scale, grad_scale, backend, maps, last, x.shape, x.dtype, weight.dtype)
        return _unrowed(fp8_matmul(rows, quantized, scale, dtype, backend), x.shape, maps, last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        columns, weight = ctx.saved_tensors
        scale, grad_scale, backend, maps, last, shape, *dtypes = ctx.settings
        scale = scale / grad_scale
        grad, grad_columns = _quantized_rows(grad, maps, E5M2, grad_scale, backend)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _unrowed(fp8_matmul(grad, weight, scale, dtypes[0], backend), shape, maps, last)
        if ctx.needs_input_grad[1]:
            grad_weight = fp8_matmul(grad_columns, columns, scale, dtypes[1], backend)
        return grad_x, grad_weight, None, None, None, None, None, None


def _quantized_rows(x: Tensor, maps: bool, dtype: torch.dtype, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """``(rows, C)`` quantised, and its transpose; see ``quantize_both``."""
    if not maps or x.is_contiguous(memory_format=torch.channels_last):
        return quantize_both(_rows(x, maps), dtype, scale, backend)
    rows = _rows(quantize(x, dtype, scale), maps)  # gathered after quantisation, at a byte a number
    return rows, rows.t()


def _rows(x: Tensor, maps: bool) -> Tensor:
    """``(..., C)`` or maps ``(N, C, H, W)`` as ``(rows, C)``."""
    return (x.permute(0, 2, 3, 1) if maps else x).reshape(-1, x.shape[1 if maps else -1])


def _unrowed(rows: Tensor, shape: torch.Size, maps: bool, last: bool) -> Tensor:
    """Rows in the shape they came from, but for the width; maps in the memory format they came from.

    In another format later layers may round differently, and a reversible network is exact to the bit.
    """
    if not maps:
        return rows.view(*shape[:-1], -1)
    n, _, height, width = shape
    found = rows.view(n, height, width, -1).permute(0, 3, 1, 2)
    return found.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _Conv2d(torch.autograd.Function):
    """Convolution of quantised operands in float32; keeps them quantised."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scales: tuple[float, float], dtype: torch.dtype, geometry: Geometry
    ) -> Tensor:
        _count("emulate, convolution")
        wide, (stride, padding, dilation) = torch.promote_types(dtype, torch.float32), geometry
        x8, weight8 = quantize(x, E4M3), quantize(weight, E4M3)
        ctx.save_for_backward(x8, weight8)
        ctx.settings = (scales, wide, geometry, x.dtype, weight.dtype)
        with without_autocast(x.device):
            return F.conv2d(x8.to(wide), weight8.to(wide), None, stride, padding, dilation).mul_(scales[0]).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (scale, grad_scale), wide, geometry, *dtypes = ctx.settings
        operands = (t.to(wide) for t in (quantize(grad, E5M2, grad_scale), x, weight))
        needed = [*ctx.needs_input_grad[:2], False]
        with without_autocast(grad.device):
            found = torch.ops.aten.convolution_backward(*operands, None, *geometry, False, [0, 0], 1, needed)
        for _ in range(sum(needed)):
            _count("emulate, convolution")
        grads = (
            g if g is None else g.mul_(scale / grad_scale).to(dtype) for g, dtype in zip(found[:2], dtypes, strict=True)
        )
        return *grads, None, None, None
