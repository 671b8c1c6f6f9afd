"""Norm, activation, squeeze-and-excite and convolution in a row, keeping one tensor where autograd keeps five."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from torch import Tensor, nn

from ...kernels.training import Structure
from ...reversible.replay import is_recomputed, once, tree
from ...reversible.traced import is_traced
from .activations import ACTIVATIONS, name_of
from .conv import conv_grads, convolved, is_plain_conv, structure_of, weight_of
from .cuda import is_small
from .norm_act import dense, has_hooks, in_forward, is_lean, norm_act
from .on_kernel import calls_for


def norm_act_conv(x: Tensor, norm: nn.Module, act: nn.Module, se: SEModule | None, conv: nn.Module) -> Tensor:
    r"""``conv(se(act(norm(x))))`` with less memory and the same values.

    .. math:: h = act(norm(x)), \qquad p = h \cdot gate(mean_{HW}(h)), \qquad y = conv(p)

    Training keeps ``x`` and the statistics; ``p``, which autograd keeps for the convolution, is computed again in the
    backward pass. In a recomputed branch the mean of ``h`` and the gate are reused as well. Modules other than
    ``nn.Conv2d``, timm's squeeze-and-excite and the pairs that ``norm_act`` knows, and modules with hooks, are simply
    called.

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
    if is_traced(x) or not (is_lean(norm, act) and is_plain_conv(conv) and (se is None or _is_plain_se(se))):
        x = norm_act(x, norm, act)
        return conv(x if se is None else se(x))
    structure = structure_of(conv, x)
    name = name_of(act) or ""
    lean = calls_for(norm, name, x)
    settings = _Settings(norm.eps, name, se, conv, structure, lean)  # type: ignore[arg-type]
    layers = _gate_parameters(se)
    operator, more = (lean.batch_norm_act_, ()) if se is None else (lean.batch_norm_act_se_, settings.gating(layers))
    kept = once(lambda: in_forward(operator, x, norm, name, settings.fresh, *more), owner=norm)
    return _NormActConv.apply(x, norm.weight, norm.bias, settings, kept, weight_of(conv, structure), conv.bias, *layers)


def _gate_parameters(se: SEModule | None) -> tuple[Tensor | None, ...]:
    return () if se is None else (weight_of(se.fc1), se.fc1.bias, weight_of(se.fc2), se.fc2.bias)


def _is_plain_se(se: SEModule) -> bool:
    if not isinstance(se.bn, nn.Identity) or not (is_plain_conv(se.fc1) and is_plain_conv(se.fc2)):
        return False
    known = name_of(se.act) is not None and name_of(se.gate) is not None
    return known and not (se.add_maxpool or any(map(has_hooks, tree(se))))


class _Settings:
    """What the function needs besides tensors; ``fresh`` has what the convolution reads, in the forward pass."""

    def __init__(
        self, eps: float, act: str, se: SEModule | None, conv: nn.Conv2d, structure: Structure | None, lean: Any
    ) -> None:
        self.eps, self.act, self.conv, self.structure, self.lean = eps, act, conv, structure, lean
        self.gate_acts: tuple[Any, ...] = () if se is None else (name_of(se.act), name_of(se.gate))
        self.fresh: list[Tensor] = []

    def gating(self, layers: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The operators' arguments ``Gate``."""
        return *layers, *self.gate_acts

    def keeps_read(self, x: Tensor) -> bool:
        """Whether what the convolution reads is kept for the backward pass, in place of a launch that repeats it.

        In a branch that is computed again the backward pass follows at once, and what is small may be held until then.
        A pointwise convolution is the branch's last: its backward pass holds its input, output and both gradients, no
        less than what is held until then with its input. A CPU, where nothing is launched, holds less.
        """
        last = self.conv.kernel_size == (1, 1) and x.device.type != "cpu"
        return is_recomputed() and (last or is_small(x))


class _NormActConv(torch.autograd.Function):
    """Keeps x and, of squeeze-and-excite, two numbers per sample and channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        settings: _Settings,
        kept: Sequence[Tensor],
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        *gate_parameters: Tensor | None,
    ) -> Tensor:
        norm, gated, lean = (x, weight, bias, *kept[:2], settings.eps, settings.act), kept[3:], settings.lean
        if settings.fresh:
            p = settings.fresh.pop()
        else:
            p = lean.norm_act_gated(*norm, *gated) if gated else lean.norm_act(*norm)
        read = p if settings.keeps_read(x) else None
        ctx.save_for_backward(x, weight, bias, conv_weight, conv_bias, read, *kept, *gate_parameters)
        ctx.settings, ctx.few = settings, len(kept)
        return convolved(p, conv_weight, conv_bias, settings.conv, settings.structure)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, conv_weight, conv_bias, p, *rest = ctx.saved_tensors
        settings, needed, lean = ctx.settings, ctx.needs_input_grad, ctx.settings.lean
        (mean, var, *gated), gate_parameters = rest[: ctx.few], rest[ctx.few :]
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_grads(settings, grad, x, weight, bias, conv_weight, conv_bias, gate_parameters)
        pooled, gate = gated or (None, None)
        norm, grad = (x, weight, bias, mean, var, settings.eps, settings.act), dense(grad)
        y = x[:0]
        if p is None:
            y, p = lean.norm_act_again(*norm, gate)
        conv = (settings.conv, settings.structure)
        wanted = (True, *needed[5:7])
        if grad.device.type == "cpu":  # one gradient after the other needs less memory
            of_conv = [*conv_grads(grad, p, conv_weight, conv[0], (False, *wanted[1:]), conv[1])[1:]]
            del p
            # of the input, its own gradient needs the shape only, and x has that
            grad_h: Any = conv_grads(grad, x, conv_weight, conv[0], (True, False, False), conv[1])[0]
        else:  # and elsewhere one call is one launch less
            grad_h, *of_conv = conv_grads(grad, p, conv_weight, conv[0], wanted, conv[1])
            del p
        del grad
        if gate is None:
            gate_grads, found = [], lean.norm_act_backward_(grad_h, *norm, y, needed[:3])
        else:
            gating = (gate, pooled, *settings.gating(gate_parameters))
            both = lean.norm_act_se_backward_(grad_h, *norm, y, *gating, needed[:3])
            gate_grads = [g if wanted else None for g, wanted in zip(both[:4], needed[7:], strict=True)]
            found = both[4:]
        if len(found) < sum(needed[:3]):
            found.insert(0, grad_h)
        of_norm = iter(found)
        return *(next(of_norm) if wanted else None for wanted in needed[:3]), None, None, *of_conv, *gate_grads


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
    return *grads[:3], None, None, *grads[3:]
