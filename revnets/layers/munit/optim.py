"""Parameter groups for munit-scaled networks: hyper-parameters found at one width serve another."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .layers import MunitScaled

_MUCH_DECAY = 0.01  # of a weight, per step: usual values are 1e-6 to 1e-3


def mus_param_groups(
    model: nn.Module, lr: float, weight_decay: float, base_width: float, width: float | None = None
) -> list[dict[str, Any]]:
    r"""Groups for an Adam-like optimizer (AdamW, Lion) by the transfer rules of munit scaling (arXiv 2502.05967).

    .. math:: \eta_{hidden} = \eta \sqrt{d_{base} / d}, \qquad \eta_{input} = \eta_{output} = \eta_{other} = \eta

    with d the width of the layer: its input features or channels (of a group), or ``width`` for all. Depthwise
    convolutions, whose fan-in does not grow with the network, keep :math:`\eta`.

    Weight decay is fully decoupled: every step takes the share ``weight_decay`` off a weight, times the schedule's
    present share of the peak learning rate, whatever the learning rate of its group. AdamW and Lion in torch and timm
    take off ``lr * weight_decay`` instead, so a group's number there is ``weight_decay / lr`` with its own lr. An
    AdamW run with lr 1e-3 and weight decay 0.05 has 5e-5 here. Biases, norms and other 1-d tensors have none, nor have
    those that the model names in ``no_weight_decay()``, as timm's do.

    Weights of size 1 need larger steps than weights of size 1/sqrt(fan-in): look for :math:`\eta` from 0.01 up.

    Args:
        model: with munit-scaled layers.
        lr: :math:`\eta`, found at ``base_width``.
        weight_decay: share of a weight per step at the peak learning rate.
        base_width: :math:`d_{base}`, the width at which ``lr`` was found.
        width: the network's one width, such as a transformer's embedding, to be used for all hidden layers.

    Returns:
        Dictionaries with ``params``, ``lr`` and ``weight_decay``.

    Raises:
        ValueError: for numbers out of range, or a model without munit-scaled layers.

    Example:
        >>> from revnets.layers import MuSLinear
        >>> net = nn.Sequential(MuSLinear(256, 256), nn.LayerNorm(256))
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in mus_param_groups(net, 0.5, 1e-4, base_width=64)]
        [(1, 0.25, 0.0004), (3, 0.5, 0.0)]
    """
    _check(lr, weight_decay, base_width, width)
    if not any(isinstance(module, MunitScaled) for module in model.modules()):
        raise ValueError(
            f"mus_param_groups: {type(model).__name__} has no munit-scaled layers: "
            "convert it first, with revnets.convert(model, 'mus_fp8')"
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    spared: Any = getattr(model, "no_weight_decay", set)()
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            own = lr * _factor(module, base_width, width) if name == "weight" else lr
            decays = parameter.dim() > 1 and (f"{prefix}.{name}" if prefix else name) not in spared
            decay = weight_decay / own if decays else 0.0
            groups.setdefault((own, decay), []).append(parameter)
    return [{"params": found, "lr": own, "weight_decay": decay} for (own, decay), found in groups.items()]


def _factor(module: Any, base_width: float, width: float | None) -> float:
    """Of the learning rate of a layer's weight."""
    if not isinstance(module, MunitScaled) or module.role != "hidden":
        return 1.0
    own = module.weight.shape[1]
    depthwise = own == 1 and getattr(module, "groups", 1) > 1
    return 1.0 if depthwise else (base_width / (width or own)) ** 0.5


def _check(lr: float, weight_decay: float, base_width: float, width: float | None) -> None:
    for name, value in {"base_width": base_width, "width": width, "lr": lr}.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"mus_param_groups: {name}={value!r}: expected a number greater than 0")
    if not 0 <= weight_decay < 1:
        raise ValueError(
            f"mus_param_groups: weight_decay={weight_decay!r}: expected the share of a weight that one step takes off, "
            "from 0 up to, not including, 1"
        )
    if weight_decay >= _MUCH_DECAY:
        warnings.warn(
            f"weight_decay={weight_decay:g} takes {weight_decay:.0%} off the weights in every step: it is fully "
            f"decoupled here; a value for torch's AdamW is to be multiplied by its learning rate ({lr:g})",
            stacklevel=3,
        )
