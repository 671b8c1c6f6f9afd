"""Batch norms of any network on the C++ kernel, with the activation inside of timm's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from ..reversible.traced import is_traced
from .lean.activations import name_of
from .lean.keeper import keeps
from .lean.norm_act import normed_on, takes_batch
from .lean.on_kernel import KernelCalls, calls_for

MIN_NUMBERS = 2**14
"""Of a map, in a norm that is called as a module: below, a call of torch's costs no more than ours."""
_KINDS = (nn.BatchNorm2d, BatchNormAct2d)


def use_kernel_norms(model: nn.Module, enabled: bool = True) -> None:
    """Have batch norms computed by the kernel in training, on the CPU, where it serves: lean layers, and as modules.

    Args:
        model: with ``nn.BatchNorm2d`` or timm's ``BatchNormAct2d``; other norms stay what they are.
        enabled: False goes back to torch's.

    Example:
        >>> net = nn.BatchNorm2d(2)
        >>> use_kernel_norms(net)
        >>> net.sparse_kernel
        True
    """
    for norm in model.modules():
        if type(norm) not in _KINDS:
            continue
        for name in _REPLACED:
            vars(norm).pop(name, None)
        norm.sparse_kernel = enabled  # type: ignore[assignment]
        if enabled:  # not a class of its own: what asks for the type, such as lean layers, still knows it
            for name, own in _REPLACED.items():
                setattr(norm, name, functools.partial(own, norm))


def _forward(norm: Any, x: Tensor) -> Tensor:
    act = None if keeps() else _act_of(norm)  # a lean network has recipes for torch's own norm
    if act is not None and not is_traced(x) and takes_batch(norm) and x.numel() >= MIN_NUMBERS:
        calls = calls_for(norm, act, x)
        if calls is KernelCalls:
            return normed_on(calls, x, norm, act, reused=False)  # torch's own may take the other time
    found: Tensor = type(norm).forward(norm, x)
    return found


def _replica(norm: Any) -> nn.Module:
    """What ``DataParallel`` copies has weights of its own: it is a norm of torch's."""
    copy: nn.Module = type(norm)._replicate_for_data_parallel(norm)
    for name in _REPLACED:
        del vars(copy)[name]
    return copy


_REPLACED: dict[str, Callable[..., Any]] = {"forward": _forward, "_replicate_for_data_parallel": _replica}
"""Methods of a norm that the kernel computes."""


def _act_of(norm: Any) -> str | None:
    """The name of the activation inside; None where something else is there."""
    if type(norm) not in _KINDS:  # such as a class that a parametrisation has made of it since
        return None
    if type(norm) is nn.BatchNorm2d:
        return ""
    if type(norm.drop) is not nn.Identity:
        return None
    if type(norm.act) is nn.Identity:
        return ""
    return "relu6" if type(norm.act) is nn.ReLU6 else name_of(norm.act)
