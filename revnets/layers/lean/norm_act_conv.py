"""Norm, activation, squeeze-and-excite and convolution in a row, keeping one tensor where autograd keeps five."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from torch import Tensor, nn

from ...kernels.training import Structure
from ...reversible.operators import calls as lean
from ...reversible.replay import once, tree
from .activations import ACTIVATIONS, name_of
from .conv import conv_grads, convolved, is_plain_conv, structure_of, weight_of
from .norm_act import dense, has_hooks, is_lean, norm_act, update_statistics


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
    settings = _Settings(norm.eps, name_of(act), se, conv, structure)  # type: ignore[arg-type]
    norm_tensors = (x, norm.weight, norm.bias, mean, var)
    return _NormActConv.apply(*norm_tensors, settings, weight_of(conv, structure), conv.bias, *_gate_parameters(se))


def _gate_parameters(se: SEModule | None) -> tuple[Tensor | None, ...]:
    return () if se is None else (weight_of(se.fc1), se.fc1.bias, weight_of(se.fc2), se.fc2.bias)


def _is_plain_se(se: SEModule) -> bool:
    if not isinstance(se.bn, nn.Identity) or not (is_plain_conv(se.fc1) and is_plain_conv(se.fc2)):
        return False
    known = name_of(se.act) is not None and name_of(se.gate) is not None
    return known and not (se.add_maxpool or any(map(has_hooks, tree(se))))


class _Settings:
    """What the function needs besides tensors."""

    def __init__(self, eps: float, act: str, se: SEModule | None, conv: nn.Conv2d, structure: Structure | None) -> None:
        self.eps, self.act, self.conv, self.structure = eps, act, conv, structure
        self.gate_acts: tuple[Any, ...] = () if se is None else (name_of(se.act), name_of(se.gate))


class _NormActConv(torch.autograd.Function):
    """Keeps x and, of squeeze-and-excite, one number per sample and channel."""

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
        *gate_parameters: Tensor | None,
    ) -> Tensor:
        norm = (x, weight, bias, mean, var, settings.eps, settings.act)
        p, *gated = _gated(norm, gate_parameters, settings) if gate_parameters else [lean.norm_act(*norm)]
        ctx.save_for_backward(x, weight, bias, mean, var, conv_weight, conv_bias, *gate_parameters, *gated)
        ctx.settings = settings
        return convolved(p, conv_weight, conv_bias, settings.conv, settings.structure)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, mean, var, conv_weight, conv_bias, *rest = ctx.saved_tensors
        settings, needed, gate_parameters = ctx.settings, ctx.needs_input_grad, rest[:4]
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_grads(settings, grad, x, weight, bias, conv_weight, conv_bias, gate_parameters)
        pooled, gate = rest[4:] or (None, None)
        norm, grad = (x, weight, bias, mean, var, settings.eps, settings.act), dense(grad)
        y, p = lean.norm_act_again(*norm, gate)
        conv = (settings.conv, settings.structure)
        wanted = (True, needed[6], needed[7])
        if grad.device.type == "cpu":  # one gradient after the other needs less memory
            of_conv = [*conv_grads(grad, p, conv_weight, conv[0], (False, *wanted[1:]), conv[1])[1:]]
            del p
            # of the input, its own gradient needs the shape only, and x has that
            grad_h: Any = conv_grads(grad, x, conv_weight, conv[0], (True, False, False), conv[1])[0]
        else:  # and elsewhere one call is one launch less
            grad_h, *of_conv = conv_grads(grad, p, conv_weight, conv[0], wanted, conv[1])
            del p
        del grad
        grad_mean, gate_grads = None, []
        if gate is not None:
            gating = (gate, pooled, *gate_parameters, *settings.gate_acts)
            grad_mean, *gate_grads = lean.se_backward(grad_h, *norm, y, *gating)
            gate_grads = [g if wanted else None for g, wanted in zip(gate_grads, needed[8:], strict=True)]
        found = lean.norm_act_backward_(grad_h, *norm, y, gate, grad_mean, needed[:3])
        if len(found) < sum(needed[:3]):
            found.insert(0, grad_h)
        of_norm = iter(found)
        return *(next(of_norm) if wanted else None for wanted in needed[:3]), None, None, None, *of_conv, *gate_grads


def _gated(norm: tuple[Any, ...], gate_parameters: Sequence[Any], settings: _Settings) -> tuple[Tensor, ...]:
    """What the convolution reads, the mean over the pixels, and the gate; in a recomputed branch the mean is reused."""
    fresh: list[Tensor] = []

    def mean() -> Tensor:
        h, pooled = lean.norm_act_mean(*norm)
        fresh.append(h)
        return pooled

    pooled = once(mean)
    gating = (pooled, *gate_parameters, *settings.gate_acts)
    if fresh:
        return fresh[0], pooled, lean.se_scale_(fresh[0], *gating)
    p, gate = lean.norm_act_se(*norm, *gating)
    return p, pooled, gate


def _differentiable_grads(
    settings: _Settings,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    gate_parameters: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients by the plain formula, differentiable again."""
    h = ACTIVATIONS[settings.act].value(F.batch_norm(x, None, None, weight, bias, True, 0.0, settings.eps))
    if gate_parameters:
        z = h.mean((2, 3))
        w1, b1, w2, b2 = gate_parameters
        for act, w, b in zip(settings.gate_acts, (w1, w2), (b1, b2), strict=True):
            z = ACTIVATIONS[act].value(F.linear(z, w.flatten(1), b))  # type: ignore[union-attr]
        h = h * z[:, :, None, None]
    conv: Any = settings.conv
    used = conv_weight if settings.structure is None else conv_weight * conv.mask
    y = convolved(h, used, conv_bias, conv)
    inputs = [x, weight, bias, conv_weight, conv_bias, *gate_parameters]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True))
    grads = [next(found) if t is not None and t.requires_grad else None for t in inputs]
    return *grads[:3], None, None, None, *grads[3:]
