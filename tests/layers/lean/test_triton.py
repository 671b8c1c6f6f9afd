"""The Triton kernels against torch's own in a row, in Triton's interpreter: values, gradients, the same bits again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = [(2, 5, 6, 7), (1, 33, 4, 4), (3, 16, 1, 1), (2, 3, 1, 9), (2, 34, 9, 8)]
ACTS = ("", "relu", "silu", "hardswish")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def maps(shape: tuple[int, ...], dtype: torch.dtype, layout: str, count: int) -> list[Tensor]:
    """Contiguous, channels-last, or one half of the channels of a larger map."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, c, h, w = shape
    made = [torch.randn(n, 2 * c, h, w, generator=generator).mul(2).add(0.3).to(dtype) for _ in range(count)]
    if layout == "half":
        return [t[:, c:] for t in made]
    kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return [t[:, :c].contiguous(memory_format=kind) for t in made]


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    scale = max(float(wanted.abs().max()), 1e-3 if dtype == torch.float32 else 0.1)  # sums of either sign cancel
    assert float((got.float() - wanted.float()).abs().max()) <= TOLERANCE[dtype] * scale, (dtype, got, wanted)


def gating(c: int, generator: torch.Generator) -> tuple[object, ...]:
    r = max(1, c // 4)
    shapes = ((r, c, 1, 1), (r,), (c, r, 1, 1), (c,))
    return *(torch.randn(s, generator=generator) for s in shapes), "hardswish", "hardsigmoid"


def check(shape: tuple[int, ...], dtype: torch.dtype, layout: str, act: str) -> None:
    """Every operator of ``cuda`` on CPU tensors, interpreted, against the one of ``ops``."""
    from revnets.layers.lean import cuda, ops

    generator = torch.Generator().manual_seed(1)
    c = shape[1]
    x, grad = maps(shape, dtype, layout, 2)
    weight, bias = torch.randn(c, generator=generator), torch.randn(c, generator=generator)
    var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    norm = (x, weight, bias, mean, var, 1e-5, act)
    gates = gating(c, generator)
    if dtype != torch.float32:
        gates = (*(t.to(dtype) for t in gates[:4]), *gates[4:])  # type: ignore[attr-defined]

    h, wanted = cuda.norm_act(*norm), ops.norm_act(*norm)
    close(h, wanted, dtype)
    again, pooled = cuda.norm_act_mean(*norm)
    assert torch.equal(again, h), "the forward pass computes other bits with the mean than without"
    close(pooled, ops.norm_act_mean(*norm)[1], dtype)
    gate = cuda.se_scale_(again, pooled, *gates)
    repeated, same = cuda.norm_act_se(*norm, pooled, *gates)
    assert torch.equal(repeated, again), "the recomputation has other bits than the forward pass"
    assert torch.equal(gate, same)
    nothing, read = cuda.norm_act_again(*norm, gate)
    assert nothing.numel() == 0
    assert torch.equal(read, again), "the weight's gradient would be that of another input"
    assert torch.equal(cuda.norm_act_again(*norm, None)[1], h)

    y, _ = ops.norm_act_again(*norm, gate)
    found, expected = (f.se_backward(grad, *norm, y, gate, pooled, *gates) for f in (cuda, ops))
    for got, want in zip(found, expected, strict=True):
        close(got, want, dtype)
    for needed in ((True, True, True), (False, True, True), (True, False, False)):
        for got, want in zip(
            cuda.norm_act_backward(grad, *norm, needed), ops.norm_act_backward(grad, *norm, needed), strict=True
        ):
            close(got, want, dtype)
        for gated in ((gate, expected[0]), (None, None)):
            mine, theirs = grad.clone(), grad.clone()
            got = cuda.norm_act_backward_(mine, *norm, y, *gated, needed)
            want = ops.norm_act_backward_(theirs, *norm, y, *gated, needed)
            if len(want) == sum(needed) and needed[0]:
                theirs = want.pop(0)
            for one, other in zip(got, want, strict=True):
                close(one, other, dtype)
            if needed[0]:
                close(mine, theirs, dtype)


def check_some() -> None:
    """Every shape, layout, precision and activation once or twice, not all their combinations."""
    layouts, kinds = ("contiguous", "channels_last", "half"), list(TOLERANCE)
    for i in range(12):
        check(SHAPES[i % len(SHAPES)], kinds[(i // 3) % 3], layouts[i % 3], ACTS[i % len(ACTS)])


def check_all() -> None:
    for shape in SHAPES:
        for dtype in TOLERANCE:
            for layout in ("contiguous", "channels_last", "half"):
                for act in ACTS if dtype == torch.float32 else ("hardswish",):
                    check(shape, dtype, layout, act)


def check_not_finite() -> None:
    """What is not a number stays so: guards look for it."""
    from revnets.layers.lean import cuda

    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 1] = torch.nan
    one = torch.ones(2)
    for act in ACTS:
        y = cuda.norm_act(x, one, one, one * 0, one, 1e-5, act)
        assert y[0, 0].isnan().sum() == 1
        assert y[0, 1].isfinite().all()


@pytest.mark.parametrize("what", ["check_some", "check_not_finite", pytest.param("check_all", marks=pytest.mark.slow)])
def test_interpreted(what: str) -> None:
    code = f"from tests.layers.lean.test_triton import {what}; {what}()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
