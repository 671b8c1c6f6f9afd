"""The kernels that ``cuda.py`` launches, in Triton: for CUDA, and for Triton's interpreter.

Imported on first use only. Arithmetic is in float32, products and sums are fused by hand (``tl.fma``) or not at all, so
that a value is the same to the bit in the forward pass and when it is computed again. Sums are over fixed parts, one
after the other: no atomic operations, so the same numbers every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- pieces -----------------------------------------------------------------------------------------------------------


@triton.jit
def _act(y, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation; NaN stays NaN."""
    if ACT == 1:
        y = tl.where(y <= 0.0, 0.0, y)
    elif ACT == 2:
        y = y / (1.0 + tl.exp(-y))
    elif ACT == 3:
        t = y + 3.0
        t = tl.where(t <= 0.0, 0.0, tl.where(t >= 6.0, 6.0, t))
        y = y * t * (1.0 / 6.0)
    elif ACT == 4:
        t = y + 3.0
        y = tl.where(t <= 0.0, 0.0, tl.where(t >= 6.0, 6.0, t)) * (1.0 / 6.0)
    elif ACT == 5:
        y = 1.0 / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _act_slope(y, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation's derivative."""
    slope = tl.full(y.shape, 1.0, tl.float32)
    if ACT == 1:
        slope = tl.where(y <= 0.0, 0.0, 1.0)
    elif ACT == 2:
        s = 1.0 / (1.0 + tl.exp(-y))
        slope = s * (1.0 + y * (1.0 - s))
    elif ACT == 3:
        slope = tl.where(y <= -3.0, 0.0, tl.where(y < 3.0, y * (1.0 / 3.0) + 0.5, 1.0))
    elif ACT == 4:
        slope = tl.where((y > -3.0) & (y < 3.0), 1.0 / 6.0, 0.0)
    elif ACT == 5:
        s = 1.0 / (1.0 + tl.exp(-y))
        slope = s * (1.0 - s)
    return slope


@triton.jit
def _coefficients(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, c, inside):  # type: ignore[no-untyped-def]
    """Mean, 1 / sigma, weight and bias of a tile's channels."""
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0).to(tl.float32)
    invstd = 1.0 / tl.sqrt(tl.load(var_ptr + c, mask=inside, other=1.0).to(tl.float32) + eps)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return mean, invstd, weight, bias


@triton.jit
def _offsets(n, c, p, channel_stride, pixel_stride, sample_stride):  # type: ignore[no-untyped-def]
    sample = tl.zeros((), tl.int64) + n  # 64 bits: a map may hold more than 2^31 numbers
    return sample * sample_stride + c[:, None].to(tl.int64) * channel_stride + p[None, :].to(tl.int64) * pixel_stride


# --- norm, activation, gate -------------------------------------------------------------------------------------------


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
    eps,
    channels,
    pixels,
    x_n,
    x_c,
    x_p,
    out_n,
    out_c,
    out_p,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    POOLED: tl.constexpr,
    LOOPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``act(norm(x))``, times the gate where there is one; or with its mean over the pixels, all of them in LOOPS."""
    n = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < channels
    mean, invstd, weight, bias = _coefficients(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, c, own)
    scale = weight * invstd
    total = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(LOOPS):
        p = (tl.program_id(0) * LOOPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = own[:, None] & (p < pixels)[None, :]
        x = tl.load(x_ptr + _offsets(n, c, p, x_c, x_p, x_n), mask=inside, other=0.0).to(tl.float32)
        y = tl.fma(x - mean[:, None], scale[:, None] + tl.zeros_like(x), bias[:, None] + tl.zeros_like(x))
        h = _act(y, ACT).to(out_ptr.dtype.element_ty)
        if GATED:
            gate = tl.load(gate_ptr + n * channels + c, mask=own, other=0.0).to(tl.float32)
            h = (h.to(tl.float32) * gate[:, None]).to(out_ptr.dtype.element_ty)
        if POOLED:
            total += tl.sum(tl.where(inside, h.to(tl.float32), 0.0), axis=1)
        tl.store(out_ptr + _offsets(n, c, p, out_c, out_p, out_n), h, mask=inside)
    if POOLED:
        tl.store(pooled_ptr + n * channels + c, (total / pixels).to(pooled_ptr.dtype.element_ty), mask=own)


@triton.jit
def scale_kernel(  # type: ignore[no-untyped-def]
    h_ptr, gate_ptr, channels, pixels, h_n, h_c, h_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    n = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    place = h_ptr + _offsets(n, c, p, h_c, h_p, h_n)
    gate = tl.load(gate_ptr + n * channels + c, mask=c < channels, other=0.0).to(tl.float32)
    h = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (h * gate[:, None]).to(h_ptr.dtype.element_ty), mask=inside)


# --- gradients --------------------------------------------------------------------------------------------------------


@triton.jit
def _inner_grad(  # type: ignore[no-untyped-def]
    grad_ptr,
    gate_ptr,
    grad_mean_ptr,
    y,
    n,
    c,
    p,
    inside,
    own,
    channels,
    pixels,
    g_n,
    g_c,
    g_p,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
):
    """The gradient of the norm's output y, from that of ``act(y) * gate`` and of the mean of ``act(y)``."""
    grad = tl.load(grad_ptr + _offsets(n, c, p, g_c, g_p, g_n), mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + n * channels + c, mask=own, other=0.0).to(tl.float32)
        extra = tl.load(grad_mean_ptr + n * channels + c, mask=own, other=0.0).to(tl.float32) / pixels
        grad = grad * gate[:, None] + extra[:, None]
    return tl.where(inside, grad * _act_slope(y, ACT), 0.0)


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
    mean, invstd, weight, bias = _coefficients(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, c, own)
    scale = weight * invstd
    sum_g = tl.zeros((BLOCK_C,), tl.float32)
    sum_gx = tl.zeros((BLOCK_C,), tl.float32)
    tiles = (pixels + BLOCK_P - 1) // BLOCK_P
    for tile in range(part, samples * tiles, PARTS):
        n = tile // tiles
        p = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = own[:, None] & (p < pixels)[None, :]
        x = tl.load(x_ptr + _offsets(n, c, p, x_c, x_p, x_n), mask=inside, other=0.0).to(tl.float32)
        centred = x - mean[:, None]
        y = tl.fma(centred, scale[:, None] + tl.zeros_like(x), bias[:, None] + tl.zeros_like(x))
        g = _inner_grad(
            grad_ptr, gate_ptr, grad_mean_ptr, y, n, c, p, inside, own, channels, pixels, g_n, g_c, g_p, ACT, GATED
        )
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
    count,
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
    INPUT: tl.constexpr,
    PARTS: tl.constexpr,
    LOOPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradient of the norm's input; the first program of a channel also writes those of its weight and bias."""
    n = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < channels
    part = tl.arange(0, PARTS)
    place = sums_ptr + part[:, None] * channels + c[None, :]
    sum_g = tl.sum(tl.load(place, mask=own[None, :], other=0.0), axis=0)
    sum_gx = tl.sum(tl.load(place + PARTS * channels, mask=own[None, :], other=0.0), axis=0)
    if (n == 0) & (tl.program_id(0) == 0):
        tl.store(grad_weight_ptr + c, sum_gx.to(grad_weight_ptr.dtype.element_ty), mask=own)
        tl.store(grad_bias_ptr + c, sum_g.to(grad_bias_ptr.dtype.element_ty), mask=own)
    if INPUT:
        mean, invstd, weight, bias = _coefficients(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, c, own)
        scale = weight * invstd
        mean_g, slope = sum_g / count, invstd * sum_gx / count
        for step in range(LOOPS):
            p = (tl.program_id(0) * LOOPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)
            inside = own[:, None] & (p < pixels)[None, :]
            x = tl.load(x_ptr + _offsets(n, c, p, x_c, x_p, x_n), mask=inside, other=0.0).to(tl.float32)
            centred = x - mean[:, None]
            y = tl.fma(centred, scale[:, None] + tl.zeros_like(x), bias[:, None] + tl.zeros_like(x))
            g = _inner_grad(
                grad_ptr, gate_ptr, grad_mean_ptr, y, n, c, p, inside, own, channels, pixels, g_n, g_c, g_p, ACT, GATED
            )
            g = (g - mean_g[:, None] - centred * slope[:, None]) * scale[:, None]
            tl.store(out_ptr + _offsets(n, c, p, o_c, o_p, o_n), g.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_grad_kernel(  # type: ignore[no-untyped-def]
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
    LOOPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sum over the pixels of ``grad * act(norm(x))``."""
    n = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = c < channels
    mean, invstd, weight, bias = _coefficients(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, c, own)
    scale = weight * invstd
    total = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(LOOPS):
        p = step * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = own[:, None] & (p < pixels)[None, :]
        x = tl.load(x_ptr + _offsets(n, c, p, x_c, x_p, x_n), mask=inside, other=0.0).to(tl.float32)
        y = tl.fma(x - mean[:, None], scale[:, None] + tl.zeros_like(x), bias[:, None] + tl.zeros_like(x))
        grad = tl.load(grad_ptr + _offsets(n, c, p, g_c, g_p, g_n), mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(grad * _act(y, ACT), axis=1)
    tl.store(out_ptr + n * channels + c, total.to(out_ptr.dtype.element_ty), mask=own)
