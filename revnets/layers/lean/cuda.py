"""The operators of ``ops`` on CUDA: Triton's kernels where they suit the tensors, else torch's own in a row."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...reversible.operators import implement
from . import ops


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _suits(*tensors: Tensor) -> bool:
    if not _has_triton():
        return False
    from . import triton

    return triton.suits(*tensors)


def norm_act(x: Tensor, *rest: Any) -> Tensor:
    if not _suits(x):
        return ops.norm_act(x, *rest)
    from . import triton

    return triton.norm_act(triton.Norm(x, *rest))


def norm_act_mean(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if not _suits(x):
        return ops.norm_act_mean(x, *rest)
    from . import triton

    pooled = x.new_empty(x.shape[:2])
    return triton.norm_act(triton.Norm(x, *rest), pooled=pooled), pooled


def se_scale_(h: Tensor, pooled: Tensor, *parameters: Any) -> Tensor:
    if not _suits(h):
        return ops.se_scale_(h, pooled, *parameters)
    from . import triton

    gate = ops.gate_of(pooled, *parameters)
    triton.scale_(h, gate.contiguous())
    return gate


def norm_act_se(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if not _suits(x):
        return ops.norm_act_se(x, *rest)
    from . import triton

    gate = ops.gate_of(*rest[6:])
    return triton.norm_act(triton.Norm(x, *rest[:6]), gate.contiguous()), gate


def norm_act_again(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if not _suits(x):
        return ops.norm_act_again(x, *rest)
    from . import triton

    gate = rest[6]
    return x.new_empty(0), triton.norm_act(triton.Norm(x, *rest[:6]), None if gate is None else gate.contiguous())


def norm_act_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    if not _suits(grad, x):
        return ops.norm_act_backward(grad, x, *rest)
    from . import triton

    needed = rest[6]
    out = torch.empty_like(grad) if needed[0] else None
    found = triton.norm_act_grads(grad, triton.Norm(x, *rest[:6]), needed, out)
    return _wanted(found, needed)


def norm_act_backward_(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    if not _suits(grad, x):
        return ops.norm_act_backward_(grad, x, *rest)
    from . import triton

    norm, (_, gate, grad_mean, needed) = triton.Norm(x, *rest[:6]), rest[6:]
    gating = None if gate is None else (gate.contiguous(), grad_mean.contiguous())
    _, *found = triton.norm_act_grads(grad, norm, needed, None, gating)
    return _wanted((None, *found), (False, *needed[1:]))


def se_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if not _suits(grad, x):
        return ops.se_backward(grad, x, *rest)
    from . import triton

    of_gate = triton.gate_grad(grad, triton.Norm(x, *rest[:6]))
    return ops.gate_grads(of_gate, *rest[7:])  # rest[6] is the norm's output, which is computed again here


def _wanted(found: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    return [g for g, wanted in zip(found, needed, strict=True) if wanted and g is not None]


for _function in (
    norm_act,
    norm_act_mean,
    se_scale_,
    norm_act_se,
    norm_act_again,
    norm_act_backward,
    norm_act_backward_,
    se_backward,
):
    implement(_function.__name__, _function, "CUDA")
