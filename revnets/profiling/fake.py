"""Fake twins of real things: the same shapes, layouts and devices, without memory or values."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)


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


def fake_twin(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``model`` with fake parameters and buffers, shared ones shared; to be called inside a fake mode."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = fake_like(tensor, device)
    return copy.deepcopy(model, memo)


def explain(error: Exception, op: str) -> ProfileError | None:
    """One sentence for what fake tensors cannot do, naming the op; None when ``error`` is something else.

    Args:
        error: raised while the step was traced.
        op: that was running.
    """
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return ProfileError(f"its op {error.func} depends on values, and fake tensors have none")
    if isinstance(error, (UnsupportedOperatorException, NotImplementedError)):
        return ProfileError(f"its op {getattr(error, 'func', op)} has no implementation for fake tensors")
    return None
