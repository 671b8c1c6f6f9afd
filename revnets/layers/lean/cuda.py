"""The operators of ``ops`` on CUDA: Triton's kernels where they suit the tensors, else torch's own in a row.

Fake tensors get the memory that the kernels would take, and no launch: so memory is predicted without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.norms import Norm
from ...reversible.cuda import launch, usable
from ...reversible.operators import implement
from ...reversible.tiles import blocks, grid, layout, like, loops, power_of_2, row_blocks, sizes
from . import ops
from .ops import NORM, Gate

ACTS = ("", "relu", "silu", "hardswish", "hardsigmoid", "sigmoid")  # numbered as the kernels know them
MOST_PARTS = 64  # partial sums per channel
MOST_SHARES = 32  # of the rows, for statistics
SMALL_ROWS = 4096  # samples x pixels: so many numbers of a channel are one program's work
SAMPLE_NUMBERS = 2**17  # channels x pixels: so many numbers of a sample are one program's work
MOST_CHANNELS = 2048  # of squeeze-and-excite: a program holds as many numbers
_TRITON, _SE = f"{__package__}.triton", f"{__package__}.se_triton"


class _Fresh(NamedTuple):
    """Statistics that the next kernel merges from parts, and writes: see ``statistics`` in ``pieces_triton``."""

    parts: Tensor
    running: ops.Running
    rows: int
    share: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.parts, *self.running[:3]

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self.running.momentum, self.rows, self.share


class _Excited(NamedTuple):
    """What the backward pass of squeeze-and-excite hands to that of the norm: see ``gate_weights_grad``."""

    gate: Tensor
    of_mean: Tensor
    given: tuple[Tensor, ...]
    of_weights: tuple[Tensor, ...]
    hidden: int


# --- forward ----------------------------------------------------------------------------------------------------------


def batch_norm_act_(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.batch_norm_act_`` by kernels of ours where they suit: by one where the maps are small."""
    if not usable(x):
        return ops.batch_norm_act_(x, *rest)
    norm, running = _measured(x, *rest)
    if not is_small(x):
        return _norm_act(norm, fresh=_moments(x, running)), norm.mean, norm.var
    out, block, numbers = like(x), row_blocks(x), (norm.eps, running.momentum, _rows(x))
    tensors = (x, out, norm.weight, norm.bias, norm.mean, norm.var, *running[:3])
    programs = (-(-x.shape[1] // block["BLOCK_C"]),)
    strides = (*layout(x), *layout(out))
    launch(_TRITON, "small_norm_act_kernel", programs, *tensors, *numbers, *sizes(x), *strides, **_act(norm), **block)
    return out, norm.mean, norm.var


def norm_act(x: Tensor, *rest: Any) -> Tensor:
    """``ops.norm_act`` by a kernel of ours where it suits."""
    return _norm_act(Norm(x, *rest)) if usable(x) else ops.norm_act(x, *rest)


def norm_act_gated(x: Tensor, *rest: Any) -> Tensor:
    """``ops.norm_act_gated`` by a kernel of ours where it suits."""
    *norm, gate = rest
    return _norm_act(Norm(x, *norm), gate) if usable(x) else ops.norm_act_gated(x, *rest)


def norm_act_again(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``ops.norm_act_again`` by a kernel of ours where it suits."""
    *norm, gate = rest
    return (x.new_empty(0), _norm_act(Norm(x, *norm), gate)) if usable(x) else ops.norm_act_again(x, *rest)


def batch_norm_act_se_(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``ops.batch_norm_act_se_`` by kernels of ours where they suit: by two where a sample is a program's work."""
    batch, se = rest[:-6], Gate(*rest[-6:])
    if not (usable(x) and _fits(x)):
        return ops.batch_norm_act_se_(x, *rest)
    norm, running = _measured(x, *batch)
    fresh = _moments(x, running)
    pooled, gate = x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
    if _is_one_program(x):
        out = like(x)
        _gate(norm, out, pooled, gate, se, fresh)
    else:
        out = _norm_act(norm, pooled=pooled, fresh=fresh)
        _gate(norm, out, pooled, gate, se)
        block = blocks(out)
        launch(_TRITON, "scale_kernel", grid(out, block), out, gate, *sizes(out), *layout(out), **block)
    return out, norm.mean, norm.var, pooled, gate


def _measured(x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str, *running: Any) -> tuple[Norm, ops.Running]:
    """The norm, with memory for its statistics."""
    mean, var = (torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
    return Norm(x, weight, bias, mean, var, eps, act), ops.Running(*running)


def _moments(x: Tensor, running: ops.Running) -> _Fresh:
    """Statistics of the batch by shares of its rows."""
    block, rows = row_blocks(x, large=True), _rows(x)
    tiles = -(-rows // block["BLOCK_R"])
    parts = min(MOST_SHARES, power_of_2(tiles))
    share = -(-tiles // parts) * block["BLOCK_R"]
    made = torch.empty(2, parts, x.shape[1], dtype=torch.float32, device=x.device)
    programs = (parts, -(-x.shape[1] // block["BLOCK_C"]))
    launch(_TRITON, "moments_kernel", programs, x, made, rows, share, *sizes(x), *layout(x), PARTS=parts, **block)
    return _Fresh(made, running, rows, share)


def _norm_act(
    norm: Norm, gate: Tensor | None = None, pooled: Tensor | None = None, fresh: _Fresh | None = None
) -> Tensor:
    """``act(norm(x))``, times a gate ``(N, C)``; or its mean over the pixels into ``pooled``, ``(N, C)``."""
    x, out, block = norm.x, like(norm.x), blocks(norm.x)
    steps = loops(x, block["BLOCK_P"], None if pooled is not None else 4)
    tensors = (x, out, x if gate is None else gate, x if pooled is None else pooled, *_of_norm(norm, fresh))
    numbers = (norm.eps, *_numbers(fresh), *sizes(x), *layout(x), *layout(out))
    flags = {**_act(norm), "GATED": gate is not None, "POOLED": pooled is not None, "LOOPS": steps}
    launch(_TRITON, "norm_act_kernel", grid(x, block, steps), *tensors, *numbers, **flags, **_parts(fresh), **block)
    return out


def _gate(norm: Norm, out: Tensor, pooled: Tensor, gate: Tensor, se: Gate, fresh: _Fresh | None = None) -> None:
    """The gate from the means; where the statistics are fresh, all of it, from the norm's input to ``out``."""
    x, se = norm.x, _contiguous(se)
    tensors = (x, out, gate, pooled, *_layers(se, x), *_of_norm(norm, fresh))
    numbers = (norm.eps, *_numbers(fresh), len(se.w1), *sizes(x), *layout(x), *layout(out))
    flags = {**_act(norm), **_of_gate(se), "WHOLE": fresh is not None, **_parts(fresh), **_sample_blocks(x)}
    launch(_SE, "se_kernel", (len(x),), *tensors, *numbers, **flags)


# --- gradients --------------------------------------------------------------------------------------------------------


def norm_act_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    """``ops.norm_act_backward`` by kernels of ours where they suit."""
    if not usable(grad, x):
        return ops.norm_act_backward(grad, x, *rest)
    *norm, needed = rest
    out = like(grad) if needed[0] else None
    found = _norm_grads(grad, Norm(x, *norm), out)
    return [g for g, wanted in zip((out, *found), needed, strict=True) if wanted and g is not None]


def norm_act_backward_(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    """``ops.norm_act_backward_`` by kernels of ours where they suit."""
    if not usable(grad, x):
        return ops.norm_act_backward_(grad, x, *rest)
    *norm, _, needed = rest
    found = _norm_grads(grad, Norm(x, *norm), grad if needed[0] else None)
    return [g for g, wanted in zip(found, needed[1:], strict=True) if wanted]


def norm_act_se_backward_(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    """``ops.norm_act_se_backward_`` by kernels of ours where they suit: by two where a sample is a program's work."""
    if not (usable(grad, x) and _fits(x)):
        return ops.norm_act_se_backward_(grad, x, *rest)
    norm, (_, gate, pooled, *layers, needed) = Norm(x, *rest[: NORM - 1]), rest[NORM - 1 :]
    excited = _excited(grad, norm, gate.contiguous(), pooled.contiguous(), Gate(*layers))
    found = _norm_grads(grad, norm, grad if needed[0] else None, excited)
    return [*excited.of_weights, *(g for g, wanted in zip(found, needed[1:], strict=True) if wanted)]


def _excited(grad: Tensor, norm: Norm, gate: Tensor, pooled: Tensor, se: Gate) -> _Excited:
    """Per sample: gradients of the means and of what both layers put out; memory for those of their weights."""
    x, se = norm.x, _contiguous(se)
    (n, c), hidden = x.shape[:2], len(se.w1)
    of_mean, grad_2, sums = torch.empty(3, n, c, dtype=torch.float32, device=x.device)
    grad_1, squeezed = torch.empty(2, n, hidden, dtype=torch.float32, device=x.device)
    whole = _is_one_program(x)
    affine, strides = (norm.weight, norm.bias, norm.mean, norm.var, norm.eps), (*layout(grad), *layout(x))
    if not whole:
        block = blocks(x)
        programs = (1, *grid(x, block)[1:])
        tensors = (grad, x, sums, *affine)
        launch(_SE, "gate_sums_kernel", programs, *tensors, *sizes(x), *strides, **_act(norm), **block)
    tensors = (grad, x, sums, pooled, *_layers(se, x), of_mean, squeezed, grad_1, grad_2, *affine)
    flags = {**_act(norm), **_of_gate(se), "WHOLE": whole, **_sample_blocks(x)}
    launch(_SE, "se_grad_kernel", (n,), *tensors, hidden, *sizes(x), *strides, **flags)
    of_b1, of_b2 = (w.new_empty(len(w)) for w in (se.w1, se.w2))  # written where there is no bias, too
    of_weights = (torch.empty_like(se.w1), of_b1, torch.empty_like(se.w2), of_b2)
    return _Excited(gate, of_mean, (pooled, squeezed, grad_1, grad_2), of_weights, hidden)


def _norm_grads(grad: Tensor, norm: Norm, out: Tensor | None, excited: _Excited | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; that of the input goes to ``out``, which may be ``grad`` itself.

    Args:
        grad: of ``act(norm(x))``, or of that times the gate.
        norm: as in the forward pass.
        out: None where it is not wanted.
        excited: with a gate; the gradients of its layers' weights are written as well.
    """
    x, small = norm.x, is_small(norm.x)
    block, (n, (c, pixels)) = row_blocks(x, "BLOCK_P") if small else blocks(x), (len(x), sizes(x))
    channel_tiles, target = -(-c // block["BLOCK_C"]), grad if out is None else out
    affine, strides = (norm.weight, norm.bias, norm.mean, norm.var, norm.eps), (*layout(grad), *layout(x))
    gating = (x, x) if excited is None else (excited.gate, excited.of_mean)
    flags = {**_act(norm), "GATED": excited is not None, **block}
    sums, parts = x, 1
    if small:
        programs: Sequence[int] = (1, channel_tiles, 1)
        steps = -(-n * pixels // block["BLOCK_P"])
    else:
        parts = min(MOST_PARTS, power_of_2(n * loops(x, block["BLOCK_P"])))
        sums = torch.empty(2, parts, c, dtype=torch.float32, device=x.device)
        given = (grad, x, *gating, *affine, sums, n, c, pixels, *strides)
        launch(_TRITON, "sums_kernel", (parts, channel_tiles), *given, PARTS=parts, **flags)
        steps = loops(x, block["BLOCK_P"], 8)
        programs = (1, channel_tiles, 1) if out is None else grid(x, block, steps)
    found = (torch.empty_like(norm.weight), torch.empty_like(norm.bias))
    weights = (x,) * 8 if excited is None else (*excited.given, *excited.of_weights)
    hidden = 0 if excited is None else excited.hidden
    tensors = (grad, target, x, *gating, *affine, sums, *found, *weights)
    flags |= {"WEIGHTS": excited is not None, "INPUT": out is not None, "SMALL": small, "PARTS": parts, "LOOPS": steps}
    numbers = (n, hidden, c, pixels, *strides, *layout(target))
    launch(_TRITON, "norm_grad_kernel", programs, *tensors, *numbers, **flags)
    return found


# --- what kernels are given -------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def is_small(x: Tensor) -> bool:
    """Whether a channel of the batch is one program's work, so that launches are what takes the time."""
    return _rows(x) <= SMALL_ROWS


def _fits(x: Tensor) -> bool:
    return x.shape[1] <= MOST_CHANNELS


def _is_one_program(x: Tensor) -> bool:
    return x[0].numel() <= SAMPLE_NUMBERS


def _sample_blocks(x: Tensor) -> dict[str, int]:
    """All channels of a sample, a few pixels at a time."""
    c, pixels = sizes(x)
    block_c = power_of_2(c)
    return {"BLOCK_C": block_c, "BLOCK_P": min(power_of_2(pixels), max(1, 4096 // block_c)), "num_warps": 8}


def _act(norm: Norm) -> dict[str, int]:
    return {"ACT": ACTS.index(norm.act)}


def _of_gate(se: Gate) -> dict[str, Any]:
    acts = {"SE_ACT": ACTS.index(se.act), "GATE_ACT": ACTS.index(se.gate_act)}
    return {**acts, "HAS_B1": se.b1 is not None, "HAS_B2": se.b2 is not None}


def _contiguous(se: Gate) -> Gate:
    w1, b1, w2, b2, *acts = se
    b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
    return Gate(w1.contiguous(), b1, w2.contiguous(), b2, *acts)


def _layers(se: Gate, filling: Tensor) -> tuple[Tensor, ...]:
    return tuple(filling if t is None else t for t in se[:4])


def _of_norm(norm: Norm, fresh: _Fresh | None) -> tuple[Tensor, ...]:
    filling = (norm.mean,) * 4 if fresh is None else fresh.tensors
    return norm.weight, norm.bias, norm.mean, norm.var, *filling


def _numbers(fresh: _Fresh | None) -> tuple[Any, ...]:
    return (0.0, 0, 0) if fresh is None else fresh.numbers


def _parts(fresh: _Fresh | None) -> dict[str, int]:
    return {"PARTS": 0 if fresh is None else fresh.parts.shape[1]}


for _function in (
    batch_norm_act_,
    norm_act,
    norm_act_gated,
    norm_act_again,
    batch_norm_act_se_,
    norm_act_backward,
    norm_act_backward_,
    norm_act_se_backward_,
):
    implement(_function.__name__, _function)
