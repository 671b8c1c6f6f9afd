"""Squeeze-and-excite in Triton: a program per sample has its means, both small layers and its gate.

Layers have at most a few thousand channels: a program holds a number per channel, and goes through the hidden ones in
blocks. Arithmetic is in float32, also where the layers' weights, or the maps, are in 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces_triton import act_slope, act_value, activated, affine, at_pixels, loaded, statistics

BLOCK_H: tl.constexpr = tl.constexpr(8)  # hidden channels at a time
BLOCK_N: tl.constexpr = tl.constexpr(8)  # samples at a time


@triton.jit
def _hidden_input(pooled, w1_ptr, b1_ptr, c, own, h, mine, channels, HAS_B1: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first layer's outputs ``h``."""
    w1 = loaded(w1_ptr, h[:, None] * channels + c[None, :], mine[:, None] & own[None, :])
    z = tl.sum(w1 * pooled[None, :], axis=1)
    if HAS_B1:
        z += loaded(b1_ptr, h, mine)
    return z


@triton.jit
def _gate_input(  # type: ignore[no-untyped-def]
    pooled,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    c,
    own,
    channels,
    hidden,
    SE_ACT: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The second layer's outputs, one per channel, from the means over the pixels."""
    z = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, hidden, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        mine = h < hidden
        squeezed = act_value(_hidden_input(pooled, w1_ptr, b1_ptr, c, own, h, mine, channels, HAS_B1), SE_ACT)
        w2 = loaded(w2_ptr, c[:, None] * hidden + h[None, :], own[:, None] & mine[None, :])
        z += tl.sum(w2 * squeezed[None, :], axis=1)
    if HAS_B2:
        z += loaded(b2_ptr, c, own)
    return z


@triton.jit
def se_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    gate_ptr,
    pooled_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
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
    hidden,
    channels,
    pixels,
    x_n,
    x_c,
    x_p,
    o_n,
    o_c,
    o_p,
    ACT: tl.constexpr,
    SE_ACT: tl.constexpr,
    GATE_ACT: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr,
    WHOLE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gate from the means; with WHOLE also the means, of ``act(norm(x))``, and that times the gate."""
    n = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    own = c < channels
    kind: tl.constexpr = pooled_ptr.dtype.element_ty
    if WHOLE:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
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
            n == 0,
            PARTS,
            BLOCK_C,
        )
        _, scale, bias = affine(weight_ptr, bias_ptr, var, eps, c, own)
        total = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, pixels, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            inside = own[:, None] & (p < pixels)[None, :]
            x = loaded(x_ptr, at_pixels(n, c, p, x_n, x_c, x_p), inside)
            h = activated(x, mean, scale, bias, dtype, ACT).to(tl.float32)
            total += tl.sum(tl.where(inside, h, 0.0), axis=1)
        pooled = (total / pixels).to(kind)
        tl.store(pooled_ptr + n * channels + c, pooled, mask=own)
        pooled = pooled.to(tl.float32)
    else:
        pooled = loaded(pooled_ptr, n * channels + c, own)
    z = _gate_input(pooled, w1_ptr, b1_ptr, w2_ptr, b2_ptr, c, own, channels, hidden, SE_ACT, HAS_B1, HAS_B2, BLOCK_C)
    gate = act_value(z, GATE_ACT).to(kind)
    tl.store(gate_ptr + n * channels + c, gate, mask=own)
    if WHOLE:
        factor = gate.to(tl.float32)
        for start in range(0, pixels, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            inside = own[:, None] & (p < pixels)[None, :]
            x = loaded(x_ptr, at_pixels(n, c, p, x_n, x_c, x_p), inside)
            h = activated(x, mean, scale, bias, dtype, ACT).to(tl.float32) * factor[:, None]
            tl.store(out_ptr + at_pixels(n, c, p, o_n, o_c, o_p), h.to(dtype), mask=inside)


# --- gradients --------------------------------------------------------------------------------------------------------


@triton.jit
def gate_sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    eps,
    channels,
    pixels,
    g_n,
    g_c,
    g_p,
    x_n,
    x_c,
    x_p,
    ACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gate's gradient, of maps too large for a program per sample."""
    n = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < channels
    total = _gate_sum(
        grad_ptr,
        x_ptr,
        weight_ptr,
        bias_ptr,
        mean_ptr,
        var_ptr,
        eps,
        n,
        c,
        own,
        pixels,
        g_n,
        g_c,
        g_p,
        x_n,
        x_c,
        x_p,
        ACT,
        BLOCK_C,
        BLOCK_P,
    )
    tl.store(out_ptr + n * channels + c, total, mask=own)


@triton.jit
def _gate_sum(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    eps,
    n,
    c,
    own,
    pixels,
    g_n,
    g_c,
    g_p,
    x_n,
    x_c,
    x_p,
    ACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sum over the pixels of ``grad * act(norm(x))``: the gradient of the gate, ``(C,)`` of a sample."""
    mean, var = loaded(mean_ptr, c, own), loaded(var_ptr, c, own)
    _, scale, bias = affine(weight_ptr, bias_ptr, var, eps, c, own)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, pixels, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = own[:, None] & (p < pixels)[None, :]
        x = loaded(x_ptr, at_pixels(n, c, p, x_n, x_c, x_p), inside)
        grad = loaded(grad_ptr, at_pixels(n, c, p, g_n, g_c, g_p), inside)
        total += tl.sum(grad * activated(x, mean, scale, bias, tl.float32, ACT), axis=1)
    return total


@triton.jit
def se_grad_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    of_gate_ptr,
    pooled_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    grad_mean_ptr,
    hidden_ptr,
    grad_1_ptr,
    grad_2_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    eps,
    hidden,
    channels,
    pixels,
    g_n,
    g_c,
    g_p,
    x_n,
    x_c,
    x_p,
    ACT: tl.constexpr,
    SE_ACT: tl.constexpr,
    GATE_ACT: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A sample's gradients: of its means, of what both layers put out, from that of the gate, found here with WHOLE.

    The hidden channels are written as well: the weights' gradients are products of them, see ``gate_weights_grad``.
    """
    n = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    own = c < channels
    if WHOLE:
        of_gate = _gate_sum(
            grad_ptr,
            x_ptr,
            weight_ptr,
            bias_ptr,
            mean_ptr,
            var_ptr,
            eps,
            n,
            c,
            own,
            pixels,
            g_n,
            g_c,
            g_p,
            x_n,
            x_c,
            x_p,
            ACT,
            BLOCK_C,
            BLOCK_P,
        )
    else:
        of_gate = loaded(of_gate_ptr, n * channels + c, own)
    pooled = loaded(pooled_ptr, n * channels + c, own)
    z = _gate_input(pooled, w1_ptr, b1_ptr, w2_ptr, b2_ptr, c, own, channels, hidden, SE_ACT, HAS_B1, HAS_B2, BLOCK_C)
    grad_2 = tl.where(own, of_gate * act_slope(z, GATE_ACT), 0.0)
    tl.store(grad_2_ptr + n * channels + c, grad_2, mask=own)
    of_mean = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, hidden, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        mine = h < hidden
        z1 = _hidden_input(pooled, w1_ptr, b1_ptr, c, own, h, mine, channels, HAS_B1)
        w2 = loaded(w2_ptr, c[:, None] * hidden + h[None, :], own[:, None] & mine[None, :])
        grad_1 = tl.where(mine, tl.sum(w2 * grad_2[:, None], axis=0) * act_slope(z1, SE_ACT), 0.0)
        tl.store(grad_1_ptr + n * hidden + h, grad_1, mask=mine)
        tl.store(hidden_ptr + n * hidden + h, act_value(z1, SE_ACT), mask=mine)
        w1 = loaded(w1_ptr, h[:, None] * channels + c[None, :], mine[:, None] & own[None, :])
        of_mean += tl.sum(w1 * grad_1[:, None], axis=0)
    tl.store(grad_mean_ptr + n * channels + c, of_mean, mask=own)


@triton.jit
def gate_weights_grad(  # type: ignore[no-untyped-def]
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
    BLOCK_C: tl.constexpr,
):
    """Gradients of the layers' weights that belong to channels ``c``, and of biases: sums over samples, in order."""
    kind: tl.constexpr = grad_w1_ptr.dtype.element_ty
    bias: tl.constexpr = grad_b1_ptr.dtype.element_ty
    for start in range(0, hidden, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        mine = h < hidden
        of_w1 = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
        of_w2 = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
        of_b1 = tl.zeros((BLOCK_H,), tl.float32)
        of_b2 = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(0, samples, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            there = n < samples
            at_c, at_h = n[:, None] * channels + c[None, :], n[:, None] * hidden + h[None, :]
            in_c, in_h = there[:, None] & own[None, :], there[:, None] & mine[None, :]
            grad_1, grad_2 = loaded(grad_1_ptr, at_h, in_h), loaded(grad_2_ptr, at_c, in_c)
            of_w1 += tl.sum(grad_1[:, :, None] * loaded(pooled_ptr, at_c, in_c)[:, None, :], axis=0)
            of_w2 += tl.sum(grad_2[:, :, None] * loaded(hidden_ptr, at_h, in_h)[:, None, :], axis=0)
            of_b1 += tl.sum(grad_1, axis=0)
            of_b2 += tl.sum(grad_2, axis=0)
        tl.store(grad_w1_ptr + h[:, None] * channels + c[None, :], of_w1.to(kind), mask=mine[:, None] & own[None, :])
        tl.store(grad_w2_ptr + c[:, None] * hidden + h[None, :], of_w2.to(kind), mask=own[:, None] & mine[None, :])
        tl.store(grad_b2_ptr + c, of_b2.to(bias), mask=own)  # the same in every turn
        tl.store(grad_b1_ptr + h, of_b1.to(bias), mask=mine)  # and for all channels
