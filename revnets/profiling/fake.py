"""Fake twins of real things: the same shapes, layouts and devices, without memory or values."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from ..training.values import reason


class ProfileError(ValueError):
    """What was asked for cannot be predicted or measured; the message is one sentence."""


def new_fake_mode() -> FakeTensorMode:
    """Where twins live. Kernels without a fake implementation are errors: torch would run them on real zeros."""
    return FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)


def fake_like(x: Tensor, device: torch.device) -> Tensor:
    """A fake tensor like ``x`` (real, meta or fake) on ``device``; to be called inside a fake mode."""
    with torch.no_grad():
        twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return nn.Parameter(twin, x.requires_grad) if isinstance(x, nn.Parameter) else twin.requires_grad_(x.requires_grad)


def fake_input(x: Any, device: torch.device) -> Any:
    """The input of a model with a fake tensor in place of each of its tensors."""
    if isinstance(x, Tensor):
        return fake_like(x, device)
    if isinstance(x, Mapping):
        return {name: fake_input(value, device) for name, value in x.items()}
    return tuple(fake_input(value, device) for value in x) if isinstance(x, (tuple, list)) else x


def fake_twin(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``model`` with fake parameters and buffers, shared ones shared; to be called inside a fake mode."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = fake_like(tensor, device)
    return copy.deepcopy(model, memo)


def explain(error: Exception, op: str) -> ProfileError:
    """One sentence for why a step cannot be traced: what fake tensors cannot do, naming the op, or what was raised.

    Args:
        error: raised while the step was traced.
        op: that was running.
    """
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return ProfileError(f"its op {error.func} depends on values, and fake tensors have none")
    if isinstance(error, (UnsupportedOperatorException, NotImplementedError)):
        return ProfileError(f"its op {getattr(error, 'func', op)} has no implementation for fake tensors")
    return ProfileError(reason(error))
