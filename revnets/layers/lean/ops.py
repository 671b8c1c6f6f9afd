"""The operators: what a lean layer computes between two convolutions, each one call of ``torch.ops.revnets``.

Off CUDA an operator is torch's own kernels in a row, to be read here; on CUDA, ``triton.py`` computes the same in one
or two kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reversible.operators import operator
from .activations import ACTIVATIONS

# --- batch norm and activation ----------------------------------------------------------------------------------------


@operator(
    "batch_stats_(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches_tracked, "
    "float momentum) -> (Tensor, Tensor)"
)
def batch_stats_(
    x: Tensor, running_mean: Tensor, running_var: Tensor, num_batches_tracked: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` of ``x`` ``(N, C, H, W)``; the running ones move."""
    num_batches_tracked.add_(1)
    return torch.batch_norm_update_stats(x, running_mean, running_var, momentum)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


_NORM = "Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, str act"


@operator(f"norm_act({_NORM}) -> Tensor")
def norm_act(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, act: str) -> Tensor:
    """``act((x - mean) / sqrt(var + eps) * weight + bias)``."""
    return ACTIVATIONS[act].value(_normed(x, weight, bias, mean, var, eps), inplace=True)


@operator(f"norm_act_mean({_NORM}) -> (Tensor, Tensor)")
def norm_act_mean(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, act: str
) -> tuple[Tensor, Tensor]:
    """``norm_act`` and its mean over the pixels, ``(N, C)``."""
    h = norm_act(x, weight, bias, mean, var, eps, act)
    return h, h.mean((2, 3))


@operator(f"norm_act_again({_NORM}, Tensor? gate) -> (Tensor, Tensor)")
def norm_act_again(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, act: str, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The norm's own output y, which ``norm_act_backward_`` asks for, and what the next convolution read.

    On CUDA y is empty: there it is cheaper to compute once more than to write and read.
    """
    y = _normed(x, weight, bias, mean, var, eps)
    p = ACTIVATIONS[act].value(y)
    return y, p if gate is None else p.mul_(gate[:, :, None, None])


# --- gradients --------------------------------------------------------------------------------------------------------


@operator(f"norm_act_backward(Tensor grad, {_NORM}, bool[3] needed) -> Tensor[]")
def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of input, weight and bias of ``norm_act``: those of the three that are needed."""
    if act:
        y = _normed(x, weight, bias, mean, var, eps)
        by_parts(lambda y, g: y.copy_(ACTIVATIONS[act].grad(g, y)), y, grad)
        grad = y
    found = batch_norm_grad(grad, x, weight, mean, var, eps, needed, owned=bool(act))
    return [g for g in found if g is not None]


@operator(
    f"norm_act_backward_(Tensor(a!) grad, {_NORM}, Tensor y, Tensor? gate, Tensor? grad_mean, bool[3] needed) "
    "-> Tensor[]"
)
def norm_act_backward_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    y: Tensor,
    gate: Tensor | None,
    grad_mean: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of input, weight and bias, where needed; that of the input is left out where ``grad`` became it.

    Args:
        grad: of ``h * gate`` (of h where there is no gate), h being ``norm_act``'s value.
        x: input of the norm.
        y: from ``norm_act_again``.
        gate: ``(N, C)``, or None.
        grad_mean: gradient of the mean of h over the pixels, ``(N, C)``, or None.
    """
    if gate is not None and grad_mean is not None:
        pixels = x.shape[2] * x.shape[3]
        grad.mul_(gate[:, :, None, None]).add_(grad_mean[:, :, None, None] / pixels)
    if act:
        by_parts(lambda g, y: g.copy_(ACTIVATIONS[act].grad(g, y)), grad, y)
    found = batch_norm_grad(grad, x, weight, mean, var, eps, needed, owned=True)
    return [g for g in found if g is not None and g is not grad]


def batch_norm_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    needed: Sequence[bool],
    owned: bool = False,
) -> tuple[Tensor | None, ...]:
    r"""Gradients of input, weight and bias of a batch norm in training.

    With g the gradient, :math:`\hat x = (x - \mu) / \sigma` and means over all but the channels,

    .. math:: \partial x = \frac{w}{\sigma} (g - \overline{g} - \hat x \, \overline{g \hat x})

    which is linear in g and x per channel. torch's CPU kernel allocates its result twice, so there it only sums.

    Args:
        grad: g, ``(N, C, H, W)``.
        x: the norm's input.
        weight: w, ``(C,)``.
        mean: of the batch.
        var: of the batch, biased.
        eps: of the norm.
        needed: which of the three gradients are wanted.
        owned: whether ``grad`` may be changed in place.
    """
    invstd = (var + eps).rsqrt_()
    kernel = torch.ops.aten.native_batch_norm_backward
    if x.device.type != "cpu" or not needed[0] or not grad.dtype == x.dtype == weight.dtype:
        return kernel(grad, x, weight, None, None, mean, invstd, True, eps, list(needed[:3]))
    _, grad_weight, grad_bias = kernel(grad, x, weight, None, None, mean, invstd, True, eps, [False, True, True])
    scale, count = weight * invstd, x.numel() // x.shape[1]
    slope = -scale * invstd * grad_weight / count
    shift = -scale * grad_bias / count - slope * mean
    scale, slope, shift = (t[:, None, None] for t in (scale, slope, shift))
    grad_x = grad.mul_(scale) if owned else grad * scale
    grad_x.addcmul_(x, slope).add_(shift)
    return grad_x, grad_weight if needed[1] else None, grad_bias if needed[2] else None


def by_parts(function: Callable[..., Tensor], *xs: Tensor, parts: int = 4) -> list[Tensor]:
    """``function`` of a few samples of tensors ``(N, ...)`` at a time: its temporaries are that much smaller."""
    return [function(*some) for some in zip(*(x.chunk(parts) for x in xs), strict=True)]


# --- squeeze-and-excite -----------------------------------------------------------------------------------------------

_GATE = "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str se_act, str gate_act"


def gate_of(
    pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate_act: str
) -> Tensor:
    """The factors ``(N, C)`` from the means ``(N, C)``; 1x1 convolutions of single pixels, as products of matrices."""
    squeezed = ACTIVATIONS[act].value(F.linear(pooled, w1.flatten(1), b1), inplace=True)
    return ACTIVATIONS[gate_act].value(F.linear(squeezed, w2.flatten(1), b2), inplace=True)


@operator(f"se_scale_(Tensor(a!) h, Tensor pooled, {_GATE}) -> Tensor")
def se_scale_(h: Tensor, pooled: Tensor, *parameters: Any) -> Tensor:
    """The gate of squeeze-and-excite, ``(N, C)``; h is multiplied by it."""
    gate = gate_of(pooled, *parameters)
    h.mul_(gate[:, :, None, None])
    return gate


@operator(f"norm_act_se({_NORM}, Tensor pooled, {_GATE}) -> (Tensor, Tensor)")
def norm_act_se(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    pooled: Tensor,
    *parameters: Any,
) -> tuple[Tensor, Tensor]:
    """``norm_act`` with its gate, and the gate, where the means over the pixels are known."""
    h = norm_act(x, weight, bias, mean, var, eps, act)
    return h, se_scale_(h, pooled, *parameters)


@operator(
    f"se_backward(Tensor grad, {_NORM}, Tensor y, Tensor gate, Tensor pooled, {_GATE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def se_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    y: Tensor,
    gate: Tensor,
    pooled: Tensor,
    *parameters: Any,
) -> tuple[Tensor, ...]:
    """Gradients of the means over the pixels, and of both weights and biases, from that of ``h * gate``."""
    of_gate = torch.cat(by_parts(lambda y, g: ACTIVATIONS[act].value(y).mul_(g).sum((2, 3)), y, grad))
    return gate_grads(of_gate, gate, pooled, *parameters)


def gate_grads(
    grad: Tensor,
    gate: Tensor,
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: str,
    gate_act: str,
) -> tuple[Tensor, ...]:
    """Gradients of ``pooled``, w1, b1, w2 and b2 from that of the gate, in the precision that it was computed in."""
    dtype = gate.dtype
    grad, means, v1, v2 = (t.to(dtype) for t in (grad, pooled, w1.flatten(1), w2.flatten(1)))
    z1 = F.linear(means, v1, None if b1 is None else b1.to(dtype))
    squeezed = ACTIVATIONS[act].value(z1)
    z2 = F.linear(squeezed, v2, None if b2 is None else b2.to(dtype))
    grad_2 = ACTIVATIONS[gate_act].grad(grad, z2)
    grad_1 = ACTIVATIONS[act].grad(grad_2 @ v2, z1)
    weights = ((grad_1.T @ means).view(w1.shape), grad_1.sum(0), (grad_2.T @ squeezed).view(w2.shape), grad_2.sum(0))
    return (grad_1 @ v1).to(pooled.dtype), *(g.to(w1.dtype) for g in weights)
