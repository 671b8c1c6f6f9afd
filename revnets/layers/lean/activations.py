"""The activations that lean layers know, by name: values and gradients from the input alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import activations as timm_acts
from torch import Tensor, nn

aten = torch.ops.aten


class Activation(NamedTuple):
    """An elementwise function.

    Attributes:
        value: of ``x``; with ``inplace=True`` it overwrites ``x``.
        grad: of the input, from the gradient of the value and the input.
    """

    value: Callable[..., Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]


def _identity(x: Tensor, inplace: bool = False) -> Tensor:
    return x if inplace else x.clone()


def _sigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return x.sigmoid_() if inplace else x.sigmoid()


ACTIVATIONS: dict[str, Activation] = {
    "": Activation(_identity, lambda grad, x: grad),
    "hardswish": Activation(F.hardswish, lambda grad, x: aten.hardswish_backward(grad, x)),
    "silu": Activation(F.silu, lambda grad, x: aten.silu_backward(grad, x)),
    "relu": Activation(F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    "relu6": Activation(F.relu6, lambda grad, x: aten.hardtanh_backward(grad, x, 0, 6)),
    "hardsigmoid": Activation(F.hardsigmoid, lambda grad, x: aten.hardsigmoid_backward(grad, x)),
    "sigmoid": Activation(_sigmoid, lambda grad, x: aten.sigmoid_backward(grad, x.sigmoid())),
}

_NAMES: dict[type, str] = {
    type(None): "",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    timm_acts.Swish: "silu",
    timm_acts.Sigmoid: "sigmoid",
}


def name_of(act: nn.Module | None) -> str | None:
    """The name of an activation module; None where it is not one of these.

    Example:
        >>> name_of(nn.SiLU()), name_of(None), name_of(nn.GELU())
        ('silu', '', None)
    """
    found: Any = _NAMES.get(type(act))
    return found
