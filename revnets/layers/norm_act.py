"""Batch norm followed by an activation, keeping one tensor for the backward pass where autograd keeps two or three."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reversible.replay import once


def norm_act(x: Tensor, norm: nn.Module, act: nn.Module | None = None) -> Tensor:
    r"""``act(norm(x))`` with less memory and the same values.

    For ``nn.BatchNorm2d`` with Hardswish, ReLU, SiLU or no activation, training keeps only ``x`` and the statistics
    (autograd would also keep the norm's output, the activation's input), and in a recomputed branch the statistics of
    the forward pass are reused, which also makes the recomputation cheaper. Any other pair of modules is simply called.

    Args:
        x: ``(N, C, H, W)``.
        norm: e.g. ``nn.BatchNorm2d(C)``.
        act: activation, or None.

    Returns:
        ``(N, C, H, W)``.

    Example:
        >>> norm_act(torch.ones(2, 4, 3, 3), nn.BatchNorm2d(4), nn.Hardswish()).shape
        torch.Size([2, 4, 3, 3])
    """
    if not is_lean(norm, act):
        x = norm(x)
        return x if act is None else act(x)
    mean, var = once(lambda: update_statistics(x, norm), owner=norm)
    return _NormAct.apply(x, norm.weight, norm.bias, mean, var, norm.eps, ACTIVATIONS[type(act)])


class _Lean:
    enabled = True  # for all threads: backward passes of accelerators have their own


def uses_lean_layers() -> bool:
    """Whether layers save memory; see ``lean_layers``."""
    return _Lean.enabled and not torch.compiler.is_compiling()


@contextmanager
def lean_layers(enabled: bool = True) -> Iterator[None]:
    """Within this context, layers save memory (the default), or call the plain modules, to compare.

    The forward and backward pass of a step belong in the same context.

    Example:
        >>> with lean_layers(False):
        ...     norm_act(torch.ones(2, 4, 3, 3), nn.BatchNorm2d(4)).shape
        torch.Size([2, 4, 3, 3])
    """
    former, _Lean.enabled = _Lean.enabled, enabled
    try:
        yield
    finally:
        _Lean.enabled = former


def is_lean(norm: nn.Module, act: nn.Module | None) -> bool:
    """Whether the lean path is the same as calling the modules: usual batch norm in training, known act, no hooks."""
    return (
        norm.training
        and uses_lean_layers()
        and type(act) in ACTIVATIONS
        and type(norm) is nn.BatchNorm2d
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.affine
        and not has_hooks(norm)
        and not (act is not None and has_hooks(act))
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches this module, so that it must be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@torch.no_grad()
def update_statistics(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the batch ``(C,)``; the running ones move once."""
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"batch norm in training needs more than one value per channel, got input of shape {tuple(x.shape)}: "
            "use a larger batch or image, or norm.eval()"
        )
    norm.num_batches_tracked.add_(1)
    return torch.batch_norm_update_stats(x.detach(), norm.running_mean, norm.running_var, norm.momentum)


def _identity(x: Tensor, inplace: bool = False) -> Tensor:
    return x if inplace else x.clone()


def _hardswish_grad(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.hardswish_backward(grad, x)


def _silu_grad(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(grad, x)


def _relu_grad(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, x, 0)


# activation module -> (activation with an `inplace` option, its gradient from the gradient and the activation's input)
ACTIVATIONS: dict[type, tuple[Any, Any]] = {
    type(None): (_identity, None),
    nn.Hardswish: (F.hardswish, _hardswish_grad),
    nn.SiLU: (F.silu, _silu_grad),
    nn.ReLU: (F.relu, _relu_grad),
}


class _NormAct(torch.autograd.Function):
    """act(batch_norm(x)) with given batch statistics, which are functions of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, kind: tuple[Any, Any]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps, ctx.kind = eps, kind
        return kind[0](F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), inplace=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the plain formula, differentiable again
            y = ctx.kind[0](F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps), inplace=True)
            inputs = (x, weight, bias)
            found = iter(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in inputs), None, None, None, None
        grad, act_grad = dense(grad), ctx.kind[1]
        if act_grad is not None:
            y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, ctx.eps)
            by_parts(lambda y, g: y.copy_(act_grad(g, y)), y, grad)
            grad = y
        owned = act_grad is not None
        grads = batch_norm_grad(grad, x, weight, mean, var, ctx.eps, ctx.needs_input_grad, owned)
        return *grads, None, None, None, None


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


def dense(x: Tensor) -> Tensor:
    """``x`` without gaps in memory (half of a tensor's channels has them), in its own memory format.

    Kernels are slow on tensors with gaps, or copy them each time; and some round differently.
    """
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        return x
    channels_last = x.dim() == 4 and x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def by_parts(function: Callable[..., Tensor], *xs: Tensor, parts: int = 4) -> list[Tensor]:
    """``function`` of a few samples of tensors ``(N, ...)`` at a time: its temporaries are that much smaller."""
    return [function(*some) for some in zip(*(x.chunk(parts) for x in xs), strict=True)]
