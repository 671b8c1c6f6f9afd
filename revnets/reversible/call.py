"""How a branch is called, so that a compiled one gives the same numbers with gradient and without."""

from collections.abc import Callable

import torch
from torch import Tensor


def is_compiled(module: Callable[..., Tensor]) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def call(module: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """``module(*xs)``; a compiled branch by the same code whether gradients are wanted or not.

    The compiler makes other code where they are not, whose values may differ in the last bit: enough for exact mode to
    be off by one step of its grid. What the branch saves in a forward pass without gradient is freed on return.
    """
    if not is_compiled(module):
        return module(*xs)
    with torch.enable_grad():
        y = module(*(x if x.requires_grad else x.detach().requires_grad_() for x in xs))
    return y if torch.is_grad_enabled() else y.detach()
