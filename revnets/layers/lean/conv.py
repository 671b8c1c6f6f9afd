"""Convolution whose backward pass needs less working memory than torch's own."""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.training import Structure
from ...reversible.traced import is_traced
from .norm_act import dense, has_hooks, uses_lean_layers


def conv(x: Tensor, module: nn.Module) -> Tensor:
    """``module(x)``; for a plain ``nn.Conv2d`` in training, its two gradients are computed one after the other.

    oneDNN's depthwise weight gradient needs a workspace of ``256 * C * K * K`` numbers. torch allocates the input's
    gradient before it; here the workspace is gone by then, and large kernels do without it.

    Args:
        x: ``(N, C, H, W)``.
        module: e.g. ``nn.Conv2d(C, C, 5, groups=C)``; anything unusual is simply called.

    Example:
        >>> conv(torch.ones(1, 4, 8, 8), nn.Conv2d(4, 4, 3, groups=4)).shape
        torch.Size([1, 4, 6, 6])
    """
    lean = torch.is_grad_enabled() and uses_lean_layers() and not is_traced(x)
    if not (lean and is_plain_conv(module)) or uses_kernel(module):
        return module(x)
    return _Conv.apply(dense(x), weight_of(module), module.bias, module)


def is_plain_conv(module: nn.Module) -> bool:
    """Whether calling the module is the same as the bare convolution with ``weight_of(module)``.

    So it is for ``nn.Conv2d``, and for subclasses that say so by having an ``effective_weight()``, unless they say
    that they quantise by a true ``fp8``.
    """
    return (
        (type(module) is nn.Conv2d or (isinstance(module, nn.Conv2d) and hasattr(module, "effective_weight")))
        and not getattr(module, "fp8", False)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not has_hooks(module)
    )


def uses_kernel(module: nn.Module) -> bool:
    """Whether it computes on the kernel that skips zeros, and keeps its input itself."""
    return bool(getattr(module, "sparse_kernel", False))


def structure_of(conv: Any, x: Tensor) -> Structure | None:
    """What the kernel that skips zeros needs for the convolution of x; None where torch computes it."""
    return conv.structure(x) if uses_kernel(conv) else None


def weight_of(conv: Any, structure: Structure | None = None) -> Tensor:
    """The weight that the convolution uses: the parameter, or what the module makes of it."""
    return conv.effective_weight() if structure is None and hasattr(conv, "effective_weight") else conv.weight


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d, structure: Structure | None = None
) -> Tensor:
    """The bare convolution with the module's settings."""
    if structure is not None:
        return structure.convolve(x, structure.values(weight), bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: nn.Conv2d,
    needed: tuple[bool, bool, bool],
    structure: Structure | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias; computed in the forward pass's precision (that of ``grad``)."""
    if structure is not None:
        return structure.grads(grad, x, structure.values(weight), weight.shape, needed)
    sizes = [conv.out_channels] if needed[2] else None
    fixed = (sizes, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups)
    operands = (grad, x.to(grad.dtype), weight.to(grad.dtype))
    grad_x = grad_weight = grad_bias = None
    if needed[1] and not needed[2] and _as_forward(x, grad, conv):
        grad_weight = _depthwise_weight_grad(*operands[:2], conv)
    elif x.device.type != "cpu":
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(*operands, *fixed, list(needed))
    elif needed[1] or needed[2]:
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(*operands, *fixed, [False, *needed[1:]])
    if needed[0] and grad_x is None:
        grad_x, _, _ = torch.ops.aten.convolution_backward(*operands, *fixed, [True, False, False])
    if grad_weight is not None:
        grad_weight = _laid_out_as(weight, grad_weight)
    dtypes = (x.dtype, weight.dtype, weight.dtype)
    return tuple(
        g if g is None else g.to(dtype) for g, dtype in zip((grad_x, grad_weight, grad_bias), dtypes, strict=True)
    )


def _laid_out_as(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the weight's strides, if those of sides of length 1 alone differ: DDP's buckets have them."""
    if grad.stride() == weight.stride():
        return grad
    sides = zip(weight.shape, weight.stride(), grad.stride(), strict=True)
    return grad if any(n != 1 and a != b for n, a, b in sides) else grad.as_strided(weight.shape, weight.stride())


def _as_forward(x: Tensor, grad: Tensor, conv: nn.Conv2d) -> bool:
    """Whether ``_depthwise_weight_grad`` is quicker than oneDNN's own kernel (by 2 to 3 times), or much smaller.

    oneDNN sums 256 partial results per weight: large kernels, and small maps with many channels, pay for that.
    """
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if not depthwise or x.device.type != "cpu" or conv.dilation != (1, 1) or conv.kernel_size[0] != conv.kernel_size[1]:
        return False
    partial = 256 * conv.weight.numel() / x.numel()
    large = conv.kernel_size[0] >= 5 and grad.shape[2] * grad.shape[3] <= 32 * 32
    return partial >= 2 or (large and (conv.stride == (1, 1) or partial >= 1))


def _depthwise_weight_grad(grad: Tensor, x: Tensor, conv: nn.Conv2d) -> Tensor:
    r"""Weight gradient of a depthwise convolution as a convolution forwards, per sample and channel.

    .. math:: \partial w_{c,i,j} = \sum_n \sum_{u,v} \partial y_{n,c,u,v} \, x_{n,c,su+i-p,sv+j-p}

    is ``x`` correlated with the gradient as a kernel dilated by the stride s, ``N C`` groups of one channel.
    """
    c, (height, width) = x.shape[1], conv.kernel_size

    def of_part(g: Tensor, maps: Tensor) -> Tensor:
        kernels, maps = g.reshape(-1, 1, *g.shape[2:]), maps.reshape(1, -1, *maps.shape[2:])
        found = F.conv2d(maps, kernels, None, 1, conv.padding, conv.stride, len(kernels))
        return found[:, :, :height, :width].view(-1, c, 1, height, width).sum(0)

    parts = max(1, x.numel() // 2**18)  # of a megabyte or so: oneDNN copies them to layouts of its own
    return reduce(Tensor.add_, map(of_part, grad.chunk(parts), x.chunk(parts)))


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
