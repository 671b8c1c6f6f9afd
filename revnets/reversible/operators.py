"""How an operator of our own is registered: one call (on a GPU, one launch) for what torch does in several.

An operator is torch's own kernels in a row, to be read where it is defined; on CUDA a kernel of ours may replace them.
A step of a network is so many launches, and small networks wait for launches rather than for arithmetic.
"""

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("revnets", "FRAGMENT")
DECOMPOSED: dict[Any, Callable[..., Any]] = {}
"""Each operator, and torch's own kernels that it stands for: memory and FLOPs are counted in these."""
calls: Any = types.SimpleNamespace()
"""The operators by name, to be called: ``calls.NAME(...)``."""
ON_CUDA: dict[Any, Callable[..., Any]] = {}
"""Operators that have kernels of their own on CUDA: what allocates and launches (for fake tensors, only allocates)."""


def operator(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``torch.ops.revnets.NAME`` with the function below as its implementation on every device.

    It is called without autograd: within an ``autograd.Function``, or on tensors without gradient.

    Args:
        signature: name, arguments and results as torch writes them, such as ``"twice(Tensor x) -> Tensor"``.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = signature.partition("(")[0]
        _LIBRARY.define(signature)
        _LIBRARY.impl(name, _in_precision(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"revnets::{name}", function, lib=_LIBRARY)
        registered = getattr(torch.ops.revnets, name).default
        DECOMPOSED[registered] = function
        setattr(calls, name, _called(function, registered))
        return function

    return register


def _called(function: Callable[..., Any], registered: Callable[..., Any]) -> Callable[..., Any]:
    """The operator; on a CPU that nobody watches, its function: torch's way to it costs tens of microseconds."""

    def call(x: Any, *rest: Any) -> Any:
        if torch.compiler.is_compiling():
            return registered(x, *rest)
        kind = (x[0] if isinstance(x, list) else x).device.type
        watched = torch._C._len_torch_dispatch_stack()
        if watched and torch.is_autocast_enabled(kind):
            _outside.precision = kind, torch.get_autocast_dtype(kind)
            try:
                return registered(x, *rest)
            finally:
                _outside.precision = None
        return registered(x, *rest) if watched or kind != "cpu" else function(x, *rest)

    return call


class _Outside(threading.local):
    precision: tuple[str, torch.dtype] | None = None


_outside = _Outside()
"""Autocast of whoever calls an operator: within a dispatch mode that somebody watches with, torch has it off."""


def _in_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        precision = _outside.precision
        if precision is None or torch.is_autocast_enabled(precision[0]):
            return function(*args, **named)
        with torch.autocast(precision[0], dtype=precision[1], cache_enabled=False):
            return function(*args, **named)

    return run


def implement(name: str, function: Callable[..., Any]) -> None:
    """Replace an operator's implementation on CUDA; fake tensors get none of its launches."""
    _LIBRARY.impl(name, _in_precision(function), "CUDA")
    ON_CUDA[getattr(torch.ops.revnets, name).default] = function
