"""The kernels of norm and activation that ``cuda.py`` launches, in Triton: for CUDA, and for Triton's interpreter.

Imported on first use only. Large maps take two passes, one for sums over shares of their rows and one that applies
them; small ones, whose channels are read by a program each, take one. See ``pieces_triton`` for why bits are the same
again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces_triton import (
    activated,
    affine,
    at_pixels,
    at_rows,
    grad_tile,
    keep_statistics,
    loaded,
    moments,
    statistics,
)
from .se_triton import gate_weights_grad

# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    parts_ptr,
    rows,
    share,
    channels,
    pixels,
    x_n,
    x_c,
    x_p,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Means, and sums of squares of what is left, over shares of the rows: ``(2, PARTS, C)``."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < channels
    first = part * share
    last = tl.minimum(first + share, rows)
    mean, squares = moments(x_ptr, c, own, first, last, pixels, x_n, x_c, x_p, BLOCK_C, BLOCK_R)
    tl.store(parts_ptr + part * channels + c, mean, mask=own)
    tl.store(parts_ptr + (PARTS + part) * channels + c, squares, mask=own)


@triton.jit
def norm_act_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    gate_ptr,
    pooled_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    parts_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    eps,
    momentum,
    rows,
    share,
    channels,
    pixels,
    x_n,
    x_c,
    x_p,
    o_n,
    o_c,
    o_p,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    POOLED: tl.constexpr,
    PARTS: tl.constexpr,
    LOOPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``act(norm(x))``, times the gate where there is one; or with its mean over the pixels, all of them in LOOPS."""
    n = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < channels
    writes = (n == 0) & (tl.program_id(0) == 0)
    mean, var = statistics(
        mean_ptr,
        var_ptr,
        parts_ptr,
        running_mean_ptr,
        running_var_ptr,
        batches_ptr,
        momentum,
        rows,
        share,
        channels,
        c,
        own,
        writes,
        PARTS,
        BLOCK_C,
    )
    _, scale, bias = affine(weight_ptr, bias_ptr, var, eps, c, own)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(LOOPS):
        p = (tl.program_id(0) * LOOPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = own[:, None] & (p < pixels)[None, :]
        x = loaded(x_ptr, at_pixels(n, c, p, x_n, x_c, x_p), inside)
        h = activated(x, mean, scale, bias, dtype, ACT)
        if GATED:
            h = (h.to(tl.float32) * loaded(gate_ptr, n * channels + c, own)[:, None]).to(dtype)
        if POOLED:
            total += tl.sum(tl.where(inside, h.to(tl.float32), 0.0), axis=1)
        tl.store(out_ptr + at_pixels(n, c, p, o_n, o_c, o_p), h, mask=inside)
    if POOLED:
        tl.store(pooled_ptr + n * channels + c, (total / pixels).to(pooled_ptr.dtype.element_ty), mask=own)


@triton.jit
def small_norm_act_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    eps,
    momentum,
    rows,
    channels,
    pixels,
    x_n,
    x_c,
    x_p,
    o_n,
    o_c,
    o_p,
    ACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``act(norm(x))`` with the batch's own statistics, which are written as well; a program has whole channels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < channels
    mean, squares = moments(x_ptr, c, own, tl.zeros((), tl.int32), rows, pixels, x_n, x_c, x_p, BLOCK_C, BLOCK_R)
    var = squares / rows
    keep_statistics(
        mean, var, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, rows, c, own
    )
    _, scale, bias = affine(weight_ptr, bias_ptr, var, eps, c, own)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = own[:, None] & (r < rows)[None, :]
        x = loaded(x_ptr, at_rows(r, c, pixels, x_n, x_c, x_p), inside)
        h = activated(x, mean, scale, bias, out_ptr.dtype.element_ty, ACT)
        tl.store(out_ptr + at_rows(r, c, pixels, o_n, o_c, o_p), h, mask=inside)


@triton.jit
def scale_kernel(  # type: ignore[no-untyped-def]
    h_ptr, gate_ptr, channels, pixels, h_n, h_c, h_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Multiply a map in place by one number per sample and channel, in float32, rounded once."""
    n = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    own = c < channels
    inside = own[:, None] & (p < pixels)[None, :]
    place = at_pixels(n, c, p, h_n, h_c, h_p)
    h = loaded(h_ptr, place, inside) * loaded(gate_ptr, n * channels + c, own)[:, None]
    tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=inside)


# --- gradients --------------------------------------------------------------------------------------------------------


@triton.jit
def sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    gate_ptr,
    grad_mean_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    eps,
    sums_ptr,
    samples,
    channels,
    pixels,
    g_n,
    g_c,
    g_p,
    x_n,
    x_c,
    x_p,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Partial sums over samples and pixels of g and of g times the normalised input: ``(2, PARTS, C)``."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < channels
    mean, var = loaded(mean_ptr, c, own), loaded(var_ptr, c, own)
    invstd, scale, bias = affine(weight_ptr, bias_ptr, var, eps, c, own)
    sum_g = tl.zeros((BLOCK_C,), tl.float32)
    sum_gx = tl.zeros((BLOCK_C,), tl.float32)
    tiles = (pixels + BLOCK_P - 1) // BLOCK_P
    for tile in range(part, samples * tiles, PARTS):
        n = tile // tiles
        p = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = own[:, None] & (p < pixels)[None, :]
        at_x, at_g = at_pixels(n, c, p, x_n, x_c, x_p), at_pixels(n, c, p, g_n, g_c, g_p)
        at_gate = n * channels + c[:, None] + tl.zeros_like(p)[None, :]
        centred, g = grad_tile(
            grad_ptr, x_ptr, gate_ptr, grad_mean_ptr, at_g, at_x, at_gate, inside, mean, scale, bias, pixels, ACT, GATED
        )
        g = tl.where(inside, g, 0.0)
        sum_g += tl.sum(g, axis=1)
        sum_gx += tl.sum(g * centred * invstd[:, None], axis=1)
    tl.store(sums_ptr + part * channels + c, sum_g, mask=own)
    tl.store(sums_ptr + (PARTS + part) * channels + c, sum_gx, mask=own)


@triton.jit
def norm_grad_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    out_ptr,
    x_ptr,
    gate_ptr,
    grad_mean_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    eps,
    sums_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    pooled_ptr,
    hidden_ptr,
    grad_1_ptr,
    grad_2_ptr,
    grad_w1_ptr,
    grad_b1_ptr,
    grad_w2_ptr,
    grad_b2_ptr,
    samples,
    hidden,
    channels,
    pixels,
    g_n,
    g_c,
    g_p,
    x_n,
    x_c,
    x_p,
    o_n,
    o_c,
    o_p,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    INPUT: tl.constexpr,
    SMALL: tl.constexpr,
    PARTS: tl.constexpr,
    LOOPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradient of the norm's input; the first program of a channel also writes those of its weight and bias.

    With SMALL a program has whole channels and sums itself, else the sums are there. With WEIGHTS the first program of
    a channel also writes the gradients of squeeze-and-excite's weights that belong to it.
    """
    n = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < channels
    mean, var = loaded(mean_ptr, c, own), loaded(var_ptr, c, own)
    invstd, scale, bias = affine(weight_ptr, bias_ptr, var, eps, c, own)
    rows = samples * pixels
    if SMALL:
        sum_g = tl.zeros((BLOCK_C,), tl.float32)
        sum_gx = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, rows, BLOCK_P):
            r = start + tl.arange(0, BLOCK_P)
            inside = own[:, None] & (r < rows)[None, :]
            at_x, at_g = at_rows(r, c, pixels, x_n, x_c, x_p), at_rows(r, c, pixels, g_n, g_c, g_p)
            at_gate = (r // pixels)[None, :] * channels + c[:, None]
            centred, g = grad_tile(
                grad_ptr,
                x_ptr,
                gate_ptr,
                grad_mean_ptr,
                at_g,
                at_x,
                at_gate,
                inside,
                mean,
                scale,
                bias,
                pixels,
                ACT,
                GATED,
            )
            g = tl.where(inside, g, 0.0)
            sum_g += tl.sum(g, axis=1)
            sum_gx += tl.sum(g * centred * invstd[:, None], axis=1)
    else:
        at_sums = tl.arange(0, PARTS)[:, None] * channels + c[None, :]
        sum_g = tl.sum(loaded(sums_ptr, at_sums, own[None, :]), axis=0)
        sum_gx = tl.sum(loaded(sums_ptr, at_sums + PARTS * channels, own[None, :]), axis=0)
    if (n == 0) & (tl.program_id(0) == 0):
        tl.store(grad_weight_ptr + c, sum_gx.to(grad_weight_ptr.dtype.element_ty), mask=own)
        tl.store(grad_bias_ptr + c, sum_g.to(grad_bias_ptr.dtype.element_ty), mask=own)
        if WEIGHTS:
            gate_weights_grad(
                pooled_ptr,
                hidden_ptr,
                grad_1_ptr,
                grad_2_ptr,
                grad_w1_ptr,
                grad_b1_ptr,
                grad_w2_ptr,
                grad_b2_ptr,
                c,
                own,
                samples,
                channels,
                hidden,
                BLOCK_C,
            )
    if INPUT:
        mean_g, slope = sum_g / rows, invstd * sum_gx / rows
        for step in range(LOOPS):
            t = (tl.program_id(0) * LOOPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
            if SMALL:
                inside = own[:, None] & (t < rows)[None, :]
                at_x, at_g = at_rows(t, c, pixels, x_n, x_c, x_p), at_rows(t, c, pixels, g_n, g_c, g_p)
                at_out = at_rows(t, c, pixels, o_n, o_c, o_p)
                at_gate = (t // pixels)[None, :] * channels + c[:, None]
            else:
                inside = own[:, None] & (t < pixels)[None, :]
                at_x, at_g = at_pixels(n, c, t, x_n, x_c, x_p), at_pixels(n, c, t, g_n, g_c, g_p)
                at_out = at_pixels(n, c, t, o_n, o_c, o_p)
                at_gate = n * channels + c[:, None] + tl.zeros_like(t)[None, :]
            centred, g = grad_tile(
                grad_ptr,
                x_ptr,
                gate_ptr,
                grad_mean_ptr,
                at_g,
                at_x,
                at_gate,
                inside,
                mean,
                scale,
                bias,
                pixels,
                ACT,
                GATED,
            )
            g = (g - mean_g[:, None] - centred * slope[:, None]) * scale[:, None]
            tl.store(out_ptr + at_out, g.to(out_ptr.dtype.element_ty), mask=inside)
