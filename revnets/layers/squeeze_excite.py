"""Squeeze-and-excite after a norm and an activation, keeping one tensor where autograd keeps three."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..reversible.replay import once
from .norm_act import ACTIVATIONS, batch_norm_grad, has_hooks, is_lean, norm_act, update_statistics


def norm_act_se(x: Tensor, norm: nn.Module, act: nn.Module, se: SEModule) -> Tensor:
    r"""``se(act(norm(x)))`` with less memory and the same values.

    .. math:: h = act(norm(x)), \qquad y = h \cdot gate(mean_{HW}(h))

    Training keeps ``x`` and the statistics; ``h`` is computed again in the backward pass. In a recomputed branch the
    mean of ``h`` is reused as well. See ``norm_act`` for when the modules are simply called.

    Args:
        x: ``(N, C, H, W)``.
        norm: e.g. ``nn.BatchNorm2d(C)``.
        act: activation.
        se: timm's squeeze-and-excite.

    Returns:
        ``(N, C, H, W)``.

    Example:
        >>> norm_act_se(torch.ones(2, 4, 3, 3), nn.BatchNorm2d(4), nn.Hardswish(), SEModule(4, rd_channels=2)).shape
        torch.Size([2, 4, 3, 3])
    """
    parameters = tuple(se.parameters())
    hooked = has_hooks(se) or any(p._backward_hooks for p in parameters)
    if not is_lean(norm, act) or se.add_maxpool or hooked:
        return se(norm_act(x, norm, act))
    mean, var = once(lambda: update_statistics(x, norm), owner=norm)
    differentiable = torch.is_grad_enabled()
    return _NormActSE.apply(
        x, norm.weight, norm.bias, mean, var, norm.eps, ACTIVATIONS[type(act)], se, differentiable, *parameters
    )


def _gate(se: SEModule, pooled: Tensor) -> Tensor:
    """The factors ``(N, C, 1, 1)`` from the means ``(N, C, 1, 1)``."""
    return se.gate(se.fc2(se.act(se.bn(se.fc1(pooled)))))


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _NormActSE(torch.autograd.Function):
    """Keeps x; the gate, a graph on tensors of one number per channel, is kept as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        kind: tuple[Any, Any],
        se: SEModule,
        differentiable: bool,
        *parameters: Tensor,
    ) -> Tensor:
        h = kind[0](F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps))
        pooled = once(lambda: h.mean((2, 3), keepdim=True))
        if differentiable:
            # plain hooks: under a checkpoint, unpacking from this graph would start a recomputation of its own
            with torch.enable_grad(), saved_tensors_hooks(_same, _same):
                pooled = pooled.detach().requires_grad_()
                gate = _gate(se, pooled)
            ctx.save_for_backward(x, weight, bias, mean, var, *parameters)
            ctx.gate, ctx.eps, ctx.kind, ctx.se = (pooled, gate), eps, kind, se
        else:
            gate = _gate(se, pooled)
        return h.mul_(gate.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, mean, var, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the plain formula, differentiable again
            h = ctx.kind[0](F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps))
            y = h * _gate(ctx.se, h.mean((2, 3), keepdim=True))
            inputs = [x, weight, bias, *parameters]
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            all_grads = [next(found) if t.requires_grad else None for t in inputs]
            return *all_grads[:3], None, None, None, None, None, None, *all_grads[3:]
        pooled, gate = ctx.gate
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, ctx.eps)
        grad_gate = ctx.kind[0](y.clone()).mul_(grad).sum((2, 3), keepdim=True)
        wanted = [p for p in parameters if p.requires_grad]
        found = iter(torch.autograd.grad(gate, [pooled, *wanted], grad_gate.to(gate.dtype), retain_graph=True))
        grad_h = grad * gate.detach()
        grad_h.add_(next(found) / (x.shape[2] * x.shape[3]))
        if ctx.kind[1] is not None:
            grad_h = ctx.kind[1](grad_h, y)
        del y
        grads = batch_norm_grad(grad_h, x, weight, mean, var, ctx.eps, ctx.needs_input_grad)
        return (
            *grads,
            None,
            None,
            None,
            None,
            None,
            None,
            *(next(found) if p.requires_grad else None for p in parameters),
        )
