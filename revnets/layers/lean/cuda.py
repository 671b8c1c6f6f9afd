"""The operators of ``ops`` on CUDA: Triton's kernels where they suit the tensors, else torch's own in a row.

Fake tensors get the memory that the kernels would take, and no launch: so memory is predicted without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reversible.cuda import usable
from ...reversible.operators import implement
from ...reversible.replay import is_fake
from ...reversible.tiles import blocks, grid, layout, like, loops, on
from . import ops

ACTS = ("", "relu", "silu", "hardswish", "hardsigmoid", "sigmoid")  # numbered as the kernels know them
MOST_PARTS = 64  # partial sums per channel


class Norm(NamedTuple):
    """The arguments that the operators share, see ``ops``."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float
    act: str

    @property
    def affine(self) -> tuple[Any, ...]:
        """What the kernels need of the norm."""
        return self.weight, self.bias, self.mean, self.var, self.eps

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels and pixels."""
        return self.x.shape[1], self.x.shape[2] * self.x.shape[3]


def norm_act(x: Tensor, *rest: Any) -> Tensor:
    """``ops.norm_act`` by a kernel of ours where it suits."""
    return _norm_act(Norm(x, *rest)) if usable(x) else ops.norm_act(x, *rest)


def norm_act_mean(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``ops.norm_act_mean`` by a kernel of ours where it suits."""
    if not usable(x):
        return ops.norm_act_mean(x, *rest)
    pooled = x.new_empty(x.shape[:2])
    return _norm_act(Norm(x, *rest), pooled=pooled), pooled


def se_scale_(h: Tensor, pooled: Tensor, *parameters: Any) -> Tensor:
    """``ops.se_scale_`` by a kernel of ours where it suits."""
    if not usable(h):
        return ops.se_scale_(h, pooled, *parameters)
    gate, block = ops.gate_of(pooled, *parameters).contiguous(), blocks(h)
    sizes = (h.shape[1], h.shape[2] * h.shape[3])
    _launch("scale_kernel", grid(h, block), h, gate, *sizes, *layout(h), **block)
    return gate


def norm_act_se(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``ops.norm_act_se`` by a kernel of ours where it suits."""
    if not usable(x):
        return ops.norm_act_se(x, *rest)
    gate = ops.gate_of(*rest[6:]).contiguous()
    return _norm_act(Norm(x, *rest[:6]), gate), gate


def norm_act_again(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``ops.norm_act_again`` by a kernel of ours where it suits."""
    if not usable(x):
        return ops.norm_act_again(x, *rest)
    return x.new_empty(0), _norm_act(Norm(x, *rest[:6]), rest[6])


def norm_act_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    """``ops.norm_act_backward`` by a kernel of ours where it suits."""
    if not usable(grad, x):
        return ops.norm_act_backward(grad, x, *rest)
    norm, needed = Norm(x, *rest[:6]), rest[6]
    out = like(grad) if needed[0] else None
    found = _norm_grads(grad, norm, out)
    return [g for g, wanted in zip((out, *found), needed, strict=True) if wanted and g is not None]


def norm_act_backward_(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    """``ops.norm_act_backward_`` by a kernel of ours where it suits."""
    if not usable(grad, x):
        return ops.norm_act_backward_(grad, x, *rest)
    norm, (_, gate, grad_mean, needed) = Norm(x, *rest[:6]), rest[6:]
    found = _norm_grads(grad, norm, grad if needed[0] else None, gate, grad_mean)
    return [g for g, wanted in zip(found, needed[1:], strict=True) if wanted]


def se_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``ops.se_backward`` by a kernel of ours where it suits."""
    if not usable(grad, x):
        return ops.se_backward(grad, x, *rest)
    norm, block = Norm(x, *rest[:6]), blocks(x)
    of_gate, steps = x.new_empty(x.shape[:2]), loops(x, block["BLOCK_P"])
    sizes = (*norm.sizes, *layout(grad), *layout(x))
    flags = {"ACT": ACTS.index(norm.act), "LOOPS": steps, **block}
    _launch("gate_grad_kernel", grid(x, block, steps), grad, x, of_gate, *norm.affine, *sizes, **flags)
    return ops.gate_grads(of_gate, *rest[7:])  # rest[6] is the norm's output, which is computed again here


def _norm_act(norm: Norm, gate: Tensor | None = None, pooled: Tensor | None = None) -> Tensor:
    """``act(norm(x))``, times a gate ``(N, C)``; or its mean over the pixels into ``pooled``, ``(N, C)``."""
    x, out, block = norm.x, like(norm.x), blocks(norm.x)
    steps = loops(x, block["BLOCK_P"], None if pooled is not None else 4)
    tensors = (x, out, x if gate is None else gate, x if pooled is None else pooled)
    flags = {"ACT": ACTS.index(norm.act), "GATED": gate is not None, "POOLED": pooled is not None, "LOOPS": steps}
    sizes = (*norm.sizes, *layout(x), *layout(out))
    _launch("norm_act_kernel", grid(x, block, steps), *tensors, *norm.affine, *sizes, **flags, **block)
    return out


def _norm_grads(
    grad: Tensor, norm: Norm, out: Tensor | None, gate: Tensor | None = None, grad_mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; that of the input goes to ``out``, which may be ``grad`` itself.

    Args:
        grad: of ``act(norm(x))``, or of that times the gate.
        norm: as in the forward pass.
        out: None where it is not wanted.
        gate: ``(N, C)``, or None.
        grad_mean: gradient of the mean of ``act(norm(x))`` over the pixels, with a gate.
    """
    x, block = norm.x, blocks(norm.x)
    n, (c, pixels) = x.shape[0], norm.sizes
    tiles = n * loops(x, block["BLOCK_P"])
    parts = min(MOST_PARTS, 1 << (tiles - 1).bit_length())
    sums = torch.empty(2, parts, c, dtype=torch.float32, device=x.device)
    grad_weight, grad_bias = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
    gating = (x, x) if gate is None or grad_mean is None else (gate.contiguous(), grad_mean.contiguous())
    flags: dict[str, Any] = {"ACT": ACTS.index(norm.act), "GATED": gate is not None, "PARTS": parts, **block}
    channel_tiles, strides = -(-c // block["BLOCK_C"]), (*layout(grad), *layout(x))
    sizes = (sums, n, c, pixels, *strides)
    _launch("sums_kernel", (parts, channel_tiles), grad, x, *gating, *norm.affine, *sizes, **flags)
    steps, target = loops(x, block["BLOCK_P"], 8), grad if out is None else out
    programs: Sequence[int] = (1, channel_tiles, 1) if out is None else grid(x, block, steps)
    results = (sums, grad_weight, grad_bias, float(n * pixels), c, pixels, *strides, *layout(target))
    flags |= {"INPUT": out is not None, "LOOPS": steps}
    _launch("norm_grad_kernel", programs, grad, target, x, *gating, *norm.affine, *results, **flags)
    return grad_weight, grad_bias


def _launch(kernel: str, programs: Sequence[int], *arguments: Any, **flags: Any) -> None:
    first: Tensor = arguments[0]
    if not is_fake(first):
        from . import triton

        with on(first.device):
            getattr(triton, kernel)[tuple(programs)](*arguments, **flags)


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
    implement(_function.__name__, _function)
