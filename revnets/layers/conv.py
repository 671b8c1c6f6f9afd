"""Convolution whose backward pass needs less working memory than torch's own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm_act import dense, has_hooks


def conv(x: Tensor, module: nn.Module) -> Tensor:
    """``module(x)``; for a plain ``nn.Conv2d`` in training, its two gradients are computed one after the other.

    oneDNN's depthwise weight gradient needs a workspace of ``256 * C * K * K`` numbers. torch allocates the input's
    gradient before it; here the workspace is gone by then.

    Args:
        x: ``(N, C, H, W)``.
        module: e.g. ``nn.Conv2d(C, C, 5, groups=C)``; anything unusual is simply called.

    Example:
        >>> conv(torch.ones(1, 4, 8, 8), nn.Conv2d(4, 4, 3, groups=4)).shape
        torch.Size([1, 4, 6, 6])
    """
    if not (torch.is_grad_enabled() and is_plain_conv(module)) or torch.compiler.is_compiling():
        return module(x)
    return _Conv.apply(dense(x), module.weight, module.bias, module)


def is_plain_conv(module: nn.Module) -> bool:
    """Whether calling the module is the same as the bare convolution with its weight."""
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not has_hooks(module)
    )


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d) -> Tensor:
    """The bare convolution with the module's settings."""
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_grads(
    grad: Tensor, x: Tensor, weight: Tensor, conv: nn.Conv2d, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias; computed in the forward pass's precision (that of ``grad``)."""
    sizes = [conv.out_channels] if needed[2] else None
    fixed = (sizes, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups)
    operands = (grad, x.to(grad.dtype), weight.to(grad.dtype))
    grad_x = grad_weight = grad_bias = None
    parts = _parts(x, weight, conv)
    if needed[1] and parts > 1 and not needed[2]:
        grad_weight = _depthwise_weight_grad(*operands, conv, parts)
    elif needed[1] or needed[2]:
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(*operands, *fixed, [False, *needed[1:]])
    if needed[0]:
        grad_x, _, _ = torch.ops.aten.convolution_backward(*operands, *fixed, [True, False, False])
    dtypes = (x.dtype, weight.dtype, weight.dtype)
    return tuple(
        g if g is None else g.to(dtype) for g, dtype in zip((grad_x, grad_weight, grad_bias), dtypes, strict=True)
    )


def _parts(x: Tensor, weight: Tensor, conv: nn.Conv2d) -> int:
    """In how many groups of channels to compute a depthwise weight gradient, so that oneDNN's workspace stays small.

    It has 256 numbers per weight: on coarse maps with many channels it would be many times the activations.
    """
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if not depthwise or x.device.type != "cpu":
        return 1
    return max(1, min(256 * weight.numel() // x.numel(), conv.groups // 16, 8))


def _depthwise_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, conv: nn.Conv2d, parts: int) -> Tensor:
    """Weight gradient of a depthwise convolution, some channels at a time."""
    found = []
    for g, v, w in zip(grad.chunk(parts, 1), x.chunk(parts, 1), weight.chunk(parts, 0), strict=True):
        fixed = (None, conv.stride, conv.padding, conv.dilation, False, [0, 0], len(w))
        found.append(torch.ops.aten.convolution_backward(g, v, w, *fixed, [False, True, False])[1])
    return torch.cat(found)


class _Conv(torch.autograd.Function):
    """Keeps what torch's own keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.conv = conv
        return convolved(x, weight, bias, conv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *conv_grads(dense(grad), x, weight, ctx.conv, ctx.needs_input_grad[:3]), None
        y = convolved(x, weight, bias, ctx.conv)  # create_graph=True: differentiable again
        inputs = (x, weight, bias)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True))
        return *(next(found) if t is not None and t.requires_grad else None for t in inputs), None
