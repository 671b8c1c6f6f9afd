"""The operators: what a lean layer computes between two convolutions, each one call of ``torch.ops.revnets``.

Off CUDA an operator is torch's own kernels in a row, to be read here; on CUDA, ``triton.py`` and ``se_triton.py``
compute the same in one or two kernels.

Operators share runs of arguments, by position: ``Norm``, ``Running``, ``Gate``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.norms import Norm
from ...reversible.operators import operator
from .activations import ACTIVATIONS
from .sums import affine_grads, batch_statistics

# --- shared arguments -------------------------------------------------------------------------------------------------


class Running(NamedTuple):
    """Statistics over batches, which an operator moves.

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``, unbiased.
        batches: how many there were, 0-d.
        momentum: how far the last one counts.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    momentum: float


class Gate(NamedTuple):
    """Squeeze-and-excite: two layers from the means over the pixels ``(N, C)`` to the factors ``(N, C)``.

    Attributes:
        w1: ``(hidden, C, 1, 1)``.
        b1: ``(hidden,)``, or None.
        w2: ``(C, hidden, 1, 1)``.
        b2: ``(C,)``, or None.
        act: of the hidden channels, a name in ``ACTIVATIONS``.
        gate_act: of the factors.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    act: str
    gate_act: str


_NORM = "Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, str act"
_BATCH = (
    "Tensor x, Tensor weight, Tensor bias, float eps, str act, "
    "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches_tracked, float momentum"
)
_GATE = "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str se_act, str gate_act"
NORM, RUNNING = len(Norm._fields), len(Running._fields)

# --- batch norm and activation ----------------------------------------------------------------------------------------


@operator(f"batch_norm_act_({_BATCH}) -> (Tensor, Tensor, Tensor)")
def batch_norm_act_(*batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``norm_act`` with the statistics of the batch, and these: mean and biased variance. The running ones move."""
    norm = _measured(*batch)
    return norm_act(*norm), norm.mean, norm.var


def _measured(x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str, *rest: Any) -> Norm:
    running = Running(*rest)
    running.batches.add_(1)
    mean, var = batch_statistics(x, running.mean, running.var, running.momentum)
    return Norm(x, weight, bias, mean, var, eps, act)


@operator(f"norm_act({_NORM}) -> Tensor")
def norm_act(*norm: Any) -> Tensor:
    """``act((x - mean) / sqrt(var + eps) * weight + bias)``."""
    given = Norm(*norm)
    return ACTIVATIONS[given.act].value(_normed(given), inplace=True)


def _normed(norm: Norm) -> Tensor:
    return F.batch_norm(norm.x, norm.mean, norm.var, norm.weight, norm.bias, False, 0.0, norm.eps)


@operator(f"norm_act_gated({_NORM}, Tensor gate) -> Tensor")
def norm_act_gated(*arguments: Any) -> Tensor:
    """``norm_act`` times a gate ``(N, C)``."""
    *norm, gate = arguments
    return norm_act(*norm).mul_(gate[:, :, None, None])


@operator(f"norm_act_again({_NORM}, Tensor? gate) -> (Tensor, Tensor)")
def norm_act_again(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The norm's own output y, which ``norm_act_backward_`` asks for, and what the next convolution read.

    On CUDA y is empty: there it is cheaper to compute once more, within the kernels, than to write and read.
    """
    norm, gate = Norm(*arguments[:NORM]), arguments[NORM]
    y = _normed(norm)
    p = ACTIVATIONS[norm.act].value(y)
    return y, p if gate is None else p.mul_(gate[:, :, None, None])


# --- squeeze-and-excite -----------------------------------------------------------------------------------------------


@operator(f"batch_norm_act_se_({_BATCH}, {_GATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def batch_norm_act_se_(*arguments: Any) -> tuple[Tensor, ...]:
    """``h * gate``, mean and variance, h being ``batch_norm_act_``'s; h's means over the pixels, and the gate."""
    batch, layers = arguments[: -len(Gate._fields)], arguments[-len(Gate._fields) :]
    h, mean, var = batch_norm_act_(*batch)
    pooled = h.mean((2, 3))
    gate = gate_of(pooled, *layers)
    return h.mul_(gate[:, :, None, None]), mean, var, pooled, gate


def gate_of(pooled: Tensor, *layers: Any) -> Tensor:
    """The factors from the means; 1x1 convolutions of single pixels, as products of matrices."""
    given = Gate(*layers)
    squeezed = ACTIVATIONS[given.act].value(F.linear(pooled, given.w1.flatten(1), given.b1), inplace=True)
    return ACTIVATIONS[given.gate_act].value(F.linear(squeezed, given.w2.flatten(1), given.b2), inplace=True)


# --- gradients --------------------------------------------------------------------------------------------------------


@operator(f"norm_act_backward(Tensor grad, {_NORM}, bool[3] needed) -> Tensor[]")
def norm_act_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of input, weight and bias of ``norm_act``: those of the three that are needed."""
    norm, needed = Norm(*arguments[:NORM]), arguments[NORM]
    given, grad = grad, dense(grad)
    if norm.act:
        y = _normed(norm)
        by_parts(lambda y, g: y.copy_(ACTIVATIONS[norm.act].grad(g, y)), y, grad)
        grad = y
    found = batch_norm_grad(grad, norm, needed, owned=grad is not given)
    return [g for g in found if g is not None]


@operator(f"norm_act_backward_(Tensor(a!) grad, {_NORM}, Tensor y, bool[3] needed) -> Tensor[]")
def norm_act_backward_(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of input, weight and bias, where needed; that of the input is left out where ``grad`` became it.

    Args:
        grad: of ``norm_act``'s value.
        arguments: ``Norm``, then y from ``norm_act_again`` or an empty tensor, then which of the three are needed.
    """
    norm, (y, needed) = Norm(*arguments[:NORM]), arguments[NORM:]
    if norm.act:
        y = y if y.numel() else _normed(norm)
        by_parts(lambda g, y: g.copy_(ACTIVATIONS[norm.act].grad(g, y)), grad, y)
    found = batch_norm_grad(grad, norm, needed, owned=True)
    return [g for g in found if g is not None and g is not grad]


@operator(
    f"norm_act_se_backward_(Tensor(a!) grad, {_NORM}, Tensor y, Tensor gate, Tensor pooled, {_GATE}, bool[3] needed) "
    "-> Tensor[]"
)
def norm_act_se_backward_(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of squeeze-and-excite's w1, b1, w2 and b2, then what ``norm_act_backward_`` gives.

    Args:
        grad: of ``h * gate``, h being ``norm_act``'s value.
        arguments: ``Norm``, y from ``norm_act_again``, gate and means over the pixels, ``Gate``, and which of the
            gradients of input, weight and bias are needed.
    """
    norm, (y, gate, pooled, *layers, needed) = Norm(*arguments[:NORM]), arguments[NORM:]
    y = y if y.numel() else _normed(norm)
    of_gate = torch.cat(by_parts(lambda y, g: ACTIVATIONS[norm.act].value(y).mul_(g).sum((2, 3)), y, grad))
    grad_mean, *of_weights = gate_grads(of_gate, gate, pooled, *layers)
    pixels = norm.x.shape[2] * norm.x.shape[3]
    grad.mul_(gate[:, :, None, None]).add_(grad_mean[:, :, None, None] / pixels)
    return [*of_weights, *norm_act_backward_(grad, *norm, y, needed)]


def gate_grads(grad: Tensor, gate: Tensor, pooled: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """Gradients of ``pooled``, w1, b1, w2 and b2 from that of the gate, in the precision that it was computed in."""
    w1, b1, w2, b2, act, gate_act = layers
    dtype = gate.dtype
    grad, means, v1, v2 = (t.to(dtype) for t in (grad, pooled, w1.flatten(1), w2.flatten(1)))
    z1 = F.linear(means, v1, None if b1 is None else b1.to(dtype))
    squeezed = ACTIVATIONS[act].value(z1)
    z2 = F.linear(squeezed, v2, None if b2 is None else b2.to(dtype))
    grad_2 = ACTIVATIONS[gate_act].grad(grad, z2)
    grad_1 = ACTIVATIONS[act].grad(grad_2 @ v2, z1)
    weights = ((grad_1.T @ means).view(w1.shape), grad_1.sum(0), (grad_2.T @ squeezed).view(w2.shape), grad_2.sum(0))
    return (grad_1 @ v1).to(pooled.dtype), *(g.to(w1.dtype) for g in weights)


def batch_norm_grad(grad: Tensor, norm: Norm, needed: Sequence[bool], owned: bool = False) -> tuple[Tensor | None, ...]:
    r"""Gradients of input, weight and bias of a batch norm in training.

    With g the gradient, :math:`\hat x = (x - \mu) / \sigma` and means over all but the channels,

    .. math:: \partial x = \frac{w}{\sigma} (g - \overline{g} - \hat x \, \overline{g \hat x})

    which is linear in g and x per channel. torch's CPU kernel allocates its result twice, so there it only sums.

    Args:
        grad: g, ``(N, C, H, W)``.
        norm: its activation does not count.
        needed: which of the three gradients are wanted.
        owned: whether ``grad`` may be changed in place.
    """
    x, weight, mean = norm.x, norm.weight, norm.mean
    invstd = (norm.var + norm.eps).rsqrt_()
    kernel = torch.ops.aten.native_batch_norm_backward
    if x.device.type != "cpu" or not needed[0] or not grad.dtype == x.dtype == weight.dtype:
        return kernel(grad, x, weight, None, None, mean, invstd, True, norm.eps, list(needed[:3]))
    grad_weight, grad_bias = affine_grads(grad, x, weight, mean, invstd, norm.eps)
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


def dense(x: Tensor) -> Tensor:
    """``x`` without gaps in memory (half of a tensor's channels has them), in its own memory format.

    Kernels are slow on tensors with gaps, or copy them each time; and some round differently.
    """
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        return x
    channels_last = x.dim() == 4 and x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
