"""The three products of an FP8 convolution without autograd, and a trial of them on a device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8 import E4M3, E5M2, quantize
from .fp8_conv import Geometry, _flat, _input_gradient, _maps, _output, _weight_gradient


def three_products(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    geometry: Geometry,
    scale: float = 1.0,
    grad_scale: float = 1.0,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient by the kernels, from operands of any precision, without autograd.

    Sums are kept in float32 and rounded once to ``out_dtype``, whatever the operands' precision was.

    Args:
        x: ``(N, C, H, W)``, not empty.
        weight: ``(outputs, C, k, k)``.
        grad: of the output, ``(N, outputs, H', W')``.
        geometry: stride, padding, dilation.
        scale: of the output, and of both gradients.
        grad_scale: static factor around the quantisation of ``grad``.
        out_dtype: of all three results, which are channels-last.
    """
    maps, taps, back = (_maps(t, E4M3, 1.0) for t in (x, weight, weight.transpose(0, 1)))
    grads, flat, rescale = _maps(grad, E5M2, grad_scale), _flat(geometry), scale / grad_scale
    return (
        _output(maps, taps, flat, scale, out_dtype, True),
        _input_gradient(grads, back, flat, rescale, list(x.shape), out_dtype, True),
        _weight_gradient(grads, maps, flat, rescale, list(weight.shape), out_dtype, True),
    )


def wrong(device: torch.device) -> str | None:
    """What is wrong with the three products of a small convolution on a device, if anything is.

    Args:
        device: that the kernels are to serve.
    """
    generator = torch.Generator().manual_seed(0)
    shapes, geometry = ((2, 24, 9, 7), (40, 24, 3, 3), (2, 40, 5, 4)), ([2, 2], [1, 1], [1, 1])
    x, weight, grad = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    got = three_products(x, weight, grad, geometry)
    operands = (quantize(t, dtype).double() for t, dtype in ((grad, E5M2), (x, E4M3), (weight, E4M3)))
    exact_grad, exact_x, exact_weight = operands
    expected = (
        F.conv2d(exact_x, exact_weight, None, *geometry),
        *torch.ops.aten.convolution_backward(
            *(exact_grad, exact_x, exact_weight, None, *geometry, False, [0, 0], 1, [True, True, False])
        )[:2],
    )
    for name, a, b in zip(("output", "input gradient", "weight gradient"), got, expected, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        if not error < 1e-3:
            return f"its {name} is off by {error:.1e} in the kernels' trial"
    return None
