"""Batch norm followed by an activation, keeping one tensor for the backward pass where autograd keeps two or three."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reversible.hooks import has_hooks
from ...reversible.replay import once
from ...reversible.traced import is_traced
from . import cuda  # noqa: F401 - registers the operators and their kernels
from .activations import ACTIVATIONS, name_of
from .on_kernel import calls_for
from .ops import dense

__all__ = ["dense", "has_hooks", "in_forward", "is_lean", "lean_layers", "norm_act", "uses_lean_layers"]


def norm_act(x: Tensor, norm: nn.Module, act: nn.Module | None = None) -> Tensor:
    r"""``act(norm(x))`` with less memory and the same values.

    For ``nn.BatchNorm2d`` with Hardswish, ReLU, SiLU or no activation, training keeps only ``x`` and the statistics
    (autograd would also keep the norm's output, the activation's input), and in a recomputed branch the statistics of
    the forward pass are reused, which also makes the recomputation cheaper. Any other pair of modules is simply called.

    Args:
        x: ``(N, C, H, W)``.
        norm: e.g. ``nn.BatchNorm2d(C)``.
        act: activation, or None.

    Returns:
        ``(N, C, H, W)``.

    Example:
        >>> norm_act(torch.ones(2, 4, 3, 3), nn.BatchNorm2d(4), nn.Hardswish()).shape
        torch.Size([2, 4, 3, 3])
    """
    if is_traced(x) or not is_lean(norm, act):
        x = norm(x)
        return x if act is None else act(x)
    name = name_of(act) or ""
    return normed_on(calls_for(norm, name, x), x, norm, name)


def normed_on(calls: Any, x: Tensor, norm: Any, act: str, reused: bool = True) -> Tensor:
    """``act(norm(x))`` of a norm that ``takes_batch``.

    Args:
        calls: the operators that compute it; see ``on_kernel.calls_for``.
        x: ``(N, C, H, W)``.
        norm: batch norm.
        act: name of an activation that these know.
        reused: whether the statistics are, when a branch is computed again: it has to come here both times then.
    """
    fresh: list[Tensor] = []

    def measured() -> Any:
        return in_forward(calls.batch_norm_act_, x, norm, act, fresh)

    mean, var = once(measured, owner=norm) if reused else measured()
    return _NormAct.apply(x, norm.weight, norm.bias, mean, var, norm.eps, act, fresh, calls)


def takes_batch(norm: Any) -> bool:
    """Whether a batch norm takes the batch's statistics, moves the running ones by a fixed share, and has weights."""
    if not (norm.training and norm.track_running_stats and norm.momentum is not None and norm.affine):
        return False
    return all(one is not None for one in (norm.running_mean, norm.running_var, norm.num_batches_tracked))


class _Lean:
    enabled = True  # for all threads: backward passes of accelerators have their own


def uses_lean_layers() -> bool:
    """Whether layers save memory; see ``lean_layers``."""
    return _Lean.enabled and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


@contextmanager
def lean_layers(enabled: bool = True) -> Iterator[None]:
    """Within this context, layers save memory (the default), or call the plain modules, to compare.

    The forward and backward pass of a step belong in the same context.

    Example:
        >>> with lean_layers(False):
        ...     norm_act(torch.ones(2, 4, 3, 3), nn.BatchNorm2d(4)).shape
        torch.Size([2, 4, 3, 3])
    """
    former, _Lean.enabled = _Lean.enabled, enabled
    try:
        yield
    finally:
        _Lean.enabled = former


def is_lean(norm: nn.Module, act: nn.Module | None) -> bool:
    """Whether the lean path is the same as calling the modules: usual batch norm in training, known act, no hooks."""
    return (
        uses_lean_layers()
        and name_of(act) is not None
        and type(norm) is nn.BatchNorm2d
        and takes_batch(norm)
        and not has_hooks(norm)
        and not (act is not None and has_hooks(act))
    )


@torch.no_grad()
def in_forward(
    operator: Callable[..., Sequence[Tensor]],
    x: Tensor,
    norm: Any,
    act: str,
    fresh: list[Tensor],
    *rest: Any,
) -> Sequence[Tensor]:
    """What an operator makes of ``x`` in the forward pass, with the batch's statistics; the running ones move once.

    Args:
        operator: gives a map, and small tensors that the recomputation needs.
        x: the norm's input.
        norm: usual batch norm.
        act: name of the activation.
        fresh: where the map is left.
        rest: more arguments of the operator.

    Returns:
        The small tensors, mean and biased variance ``(C,)`` first.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"batch norm in training needs more than one value per channel, got input of shape {tuple(x.shape)}: "
            "use a larger batch or image, or norm.eval()"
        )
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum)
    value, *kept = operator(x.detach(), norm.weight, norm.bias, norm.eps, act, *running, *rest)
    fresh.append(value)
    return kept


class _NormAct(torch.autograd.Function):
    """act(batch_norm(x)) with given statistics of the batch, which are functions of x; ``fresh`` may have it."""

    takes_gaps = True  # of its gradient: the operator sees to them

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        act: str,
        fresh: list[Tensor],
        calls: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps, ctx.act, ctx.calls = eps, act, calls
        return fresh.pop() if fresh else calls.norm_act(x, weight, bias, mean, var, eps, act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the plain formula, differentiable again
            y = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)
            y = ACTIVATIONS[ctx.act].value(y, inplace=True)
            inputs = (x, weight, bias)
            found = iter(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in inputs), *[None] * 6
        needed = ctx.needs_input_grad[:3]
        norm = (x, weight, bias, mean, var, ctx.eps, ctx.act)
        found = iter(ctx.calls.norm_act_backward(grad, *norm, needed))
        return *(next(found) if wanted else None for wanted in needed), *[None] * 6
