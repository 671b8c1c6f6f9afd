"""Norm, activation, squeeze-and-excite and convolution in a row, keeping one tensor where autograd keeps five."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..kernels.training import Structure
from ..reversible.replay import once, parameters_of, tree
from .conv import conv_grads, convolved, is_plain_conv, structure_of, weight_of
from .norm_act import ACTIVATIONS, batch_norm_grad, by_parts, dense, has_hooks, is_lean, norm_act, update_statistics


def norm_act_conv(x: Tensor, norm: nn.Module, act: nn.Module, se: SEModule | None, conv: nn.Module) -> Tensor:
    r"""``conv(se(act(norm(x))))`` with less memory and the same values.

    .. math:: h = act(norm(x)), \qquad p = h \cdot gate(mean_{HW}(h)), \qquad y = conv(p)

    Training keeps ``x`` and the statistics; ``p``, which autograd keeps for the convolution, is computed again in the
    backward pass. In a recomputed branch the mean of ``h`` is reused as well. Modules other than ``nn.Conv2d``, timm's
    squeeze-and-excite and the pairs that ``norm_act`` knows, and modules with hooks, are simply called.

    Args:
        x: ``(N, C, H, W)``.
        norm: e.g. ``nn.BatchNorm2d(C)``.
        act: activation.
        se: timm's squeeze-and-excite, or None.
        conv: e.g. ``nn.Conv2d(C, D, 1)``.

    Returns:
        ``(N, D, H', W')``.

    Example:
        >>> conv = nn.Conv2d(4, 6, 1)
        >>> norm_act_conv(torch.ones(2, 4, 3, 3), nn.BatchNorm2d(4), nn.Hardswish(), SEModule(4), conv).shape
        torch.Size([2, 6, 3, 3])
    """
    if not (is_lean(norm, act) and is_plain_conv(conv) and (se is None or _is_plain_se(se))):
        x = norm_act(x, norm, act)
        return conv(x if se is None else se(x))
    mean, var = once(lambda: update_statistics(x, norm), owner=norm)
    structure = structure_of(conv, x)
    kind: Any = ACTIVATIONS[type(act)]
    settings = _Settings(norm.eps, kind, se, conv, torch.is_grad_enabled(), structure)  # type: ignore[arg-type]
    gate_parameters = () if se is None else tuple(parameters_of(se))
    return _NormActConv.apply(
        x, norm.weight, norm.bias, mean, var, settings, weight_of(conv, structure), conv.bias, *gate_parameters
    )


def _is_plain_se(se: SEModule) -> bool:
    if not isinstance(se.bn, nn.Identity) or not (is_plain_conv(se.fc1) and is_plain_conv(se.fc2)):
        return False
    hooked = any(map(has_hooks, tree(se))) or any(p._backward_hooks for p in parameters_of(se))
    return not (se.add_maxpool or hooked)


class _Settings:
    """What the function needs besides tensors."""

    def __init__(
        self,
        eps: float,
        kind: tuple[Any, Any],
        se: SEModule | None,
        conv: nn.Conv2d,
        differentiable: bool,
        structure: Structure | None,
    ) -> None:
        self.eps, self.kind, self.se, self.conv, self.differentiable = eps, kind, se, conv, differentiable
        self.structure = structure

    def normed(self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    def gate(self, pooled: Tensor) -> Tensor:
        """The factors ``(N, C, 1, 1)`` from the means ``(N, C, 1, 1)``."""
        se: Any = self.se
        squeezed = se.act(se.bn(_pointwise(pooled.flatten(1), se.fc1)))
        return se.gate(_pointwise(squeezed, se.fc2))[:, :, None, None]


def _pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution of single pixels ``(N, C)``: as a product of matrices it costs a tenth."""
    return F.linear(x, weight_of(conv).flatten(1), conv.bias)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _NormActConv(torch.autograd.Function):
    """Keeps x; the gate, a graph on tensors of one number per channel, is kept as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        settings: _Settings,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        *gate_parameters: Tensor,
    ) -> Tensor:
        p = settings.kind[0](settings.normed(x, weight, bias, mean, var), inplace=True)
        if settings.se is not None:
            pooled = once(lambda: p.mean((2, 3), keepdim=True))
            # plain hooks: under a checkpoint, unpacking from this graph would start a recomputation of its own
            with torch.set_grad_enabled(settings.differentiable), saved_tensors_hooks(_same, _same):
                pooled = pooled.detach().requires_grad_(settings.differentiable)
                gate = settings.gate(pooled)
            p.mul_(gate.detach())
            ctx.gate = (pooled, gate)
        ctx.save_for_backward(x, weight, bias, mean, var, conv_weight, conv_bias, *gate_parameters)
        ctx.settings = settings
        return convolved(p, conv_weight, conv_bias, settings.conv, settings.structure)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_grads(ctx, grad)
        x, weight, bias, mean, var, conv_weight, _, *gate_parameters = ctx.saved_tensors
        settings, needed = ctx.settings, ctx.needs_input_grad
        act, act_grad = settings.kind
        y, grad = settings.normed(x, weight, bias, mean, var), dense(grad)
        p = act(y)
        if settings.se is not None:
            p.mul_(ctx.gate[1].detach())
        conv = (settings.conv, settings.structure)
        of_conv = conv_grads(grad, p, conv_weight, conv[0], (False, needed[6], needed[7]), conv[1])[1:]
        del p
        # of the input, its own gradient needs the shape only, and y has that
        grad_h: Any = conv_grads(grad, y, conv_weight, conv[0], (True, False, False), conv[1])[0]
        del grad
        gate_grads: list[Tensor | None] = []
        if settings.se is not None:
            pooled, gate = ctx.gate
            grad_gate = torch.cat(by_parts(lambda y, g: act(y).mul_(g).sum((2, 3), keepdim=True), y, grad_h))
            wanted = [p for p in gate_parameters if p.requires_grad]
            found = iter(torch.autograd.grad(gate, [pooled, *wanted], grad_gate.to(gate.dtype), retain_graph=True))
            grad_h.mul_(gate.detach()).add_(next(found) / (x.shape[2] * x.shape[3]))
            gate_grads = [next(found) if p.requires_grad else None for p in gate_parameters]
        if act_grad is not None:
            by_parts(lambda g, y: g.copy_(act_grad(g, y)), grad_h, y)
        del y
        norm_grads = batch_norm_grad(grad_h, x, weight, mean, var, settings.eps, needed, owned=True)
        return *norm_grads, None, None, None, *of_conv, *gate_grads


def _differentiable_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by the plain formula, differentiable again."""
    x, weight, bias, _, _, conv_weight, conv_bias, *gate_parameters = ctx.saved_tensors
    settings = ctx.settings
    h = settings.kind[0](F.batch_norm(x, None, None, weight, bias, True, 0.0, settings.eps))
    if settings.se is not None:
        h = h * settings.gate(h.mean((2, 3), keepdim=True))
    used = conv_weight if settings.structure is None else conv_weight * settings.conv.mask
    y = convolved(h, used, conv_bias, settings.conv)
    inputs = [x, weight, bias, conv_weight, conv_bias, *gate_parameters]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True))
    grads = [next(found) if t is not None and t.requires_grad else None for t in inputs]
    return *grads[:3], None, None, None, *grads[3:]
