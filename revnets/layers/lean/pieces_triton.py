"""What the kernels share: activations, the norm's arithmetic, tiles, statistics of a batch.

Arithmetic is in float32, products and sums are fused by hand (``tl.fma``) or not at all, so that a value is the same to
the bit in the forward pass and when it is computed again. Sums are over fixed parts, one after the other: no atomic
operations, so the same numbers every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- activations ------------------------------------------------------------------------------------------------------


@triton.jit
def act_value(y, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
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
def act_slope(y, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
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


# --- tiles: channels x pixels of one sample, or channels x rows, which are the pixels of all samples ------------------


@triton.jit
def at_pixels(n, c, p, sample_stride, channel_stride, pixel_stride):  # type: ignore[no-untyped-def]
    """Where a tile of sample n lies."""
    sample = tl.zeros((), tl.int64) + n  # 64 bits: a map may hold more than 2^31 numbers
    return sample * sample_stride + c[:, None].to(tl.int64) * channel_stride + p[None, :].to(tl.int64) * pixel_stride


@triton.jit
def at_rows(r, c, pixels, sample_stride, channel_stride, pixel_stride):  # type: ignore[no-untyped-def]
    """Where a tile of rows lies."""
    n = r // pixels
    row = n.to(tl.int64) * sample_stride + (r - n * pixels).to(tl.int64) * pixel_stride
    return row[None, :] + c[:, None].to(tl.int64) * channel_stride


@triton.jit
def loaded(ptr, place, inside):  # type: ignore[no-untyped-def]
    """Numbers in float32; 0 outside."""
    return tl.load(ptr + place, mask=inside, other=0.0).to(tl.float32)


# --- norm -------------------------------------------------------------------------------------------------------------


@triton.jit
def affine(weight_ptr, bias_ptr, var, eps, c, own):  # type: ignore[no-untyped-def]
    """1 / sigma, weight / sigma and bias of channels."""
    invstd = 1.0 / tl.sqrt(var + eps)
    return invstd, loaded(weight_ptr, c, own) * invstd, loaded(bias_ptr, c, own)


@triton.jit
def normed(centred, scale, bias):  # type: ignore[no-untyped-def]
    """The norm's output: ``centred * scale + bias``."""
    zero = tl.zeros_like(centred)
    return tl.fma(centred, scale[:, None] + zero, bias[:, None] + zero)


@triton.jit
def activated(x, mean, scale, bias, dtype: tl.constexpr, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """``act(norm(x))`` in the precision that it is written in."""
    return act_value(normed(x - mean[:, None], scale, bias), ACT).to(dtype)


@triton.jit
def moments(  # type: ignore[no-untyped-def]
    x_ptr, c, own, first, last, pixels, x_n, x_c, x_p, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Mean, and sum of the squares of what is left, of rows ``first`` to ``last``: tiles are merged one by one."""
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = own[:, None] & (r < last)[None, :]
        x = loaded(x_ptr, at_rows(r, c, pixels, x_n, x_c, x_p), inside)
        count = tl.minimum(last - start, BLOCK_R).to(tl.float32)
        before = (start - first).to(tl.float32)
        of_tile = tl.sum(x, axis=1) / count
        left = tl.where(inside, x - of_tile[:, None], 0.0)
        change = of_tile - mean
        mean += change * (count / (before + count))
        squares += tl.sum(left * left, axis=1) + change * change * (before * count / (before + count))
    return mean, squares


@triton.jit
def statistics(  # type: ignore[no-untyped-def]
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
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and variance of the batch: given, or merged from PARTS shares of the rows; who ``writes`` leaves them there.

    The parts, ``(2, PARTS, C)``, are ``moments``.
    """
    if PARTS == 0:
        mean = loaded(mean_ptr, c, own)
        var = tl.load(var_ptr + c, mask=own, other=1.0).to(tl.float32)
    else:
        mean = tl.zeros((BLOCK_C,), tl.float32)
        for part in range(PARTS):
            count = tl.minimum(tl.maximum(rows - part * share, 0), share).to(tl.float32)
            mean += loaded(parts_ptr, part * channels + c, own) * (count / rows)
        squares = tl.zeros((BLOCK_C,), tl.float32)
        for part in range(PARTS):
            count = tl.minimum(tl.maximum(rows - part * share, 0), share).to(tl.float32)
            away = loaded(parts_ptr, part * channels + c, own) - mean
            squares += loaded(parts_ptr, (PARTS + part) * channels + c, own) + away * away * count
        var = squares / rows
        if writes:
            keep_statistics(
                mean, var, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, rows, c, own
            )
    return mean, var


@triton.jit
def keep_statistics(  # type: ignore[no-untyped-def]
    mean, var, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, batches_ptr, momentum, rows, c, own
):
    """Write mean and variance, move the running ones; the program of channel 0 counts the batch."""
    tl.store(mean_ptr + c, mean, mask=own)
    tl.store(var_ptr + c, var, mask=own)
    former = loaded(running_mean_ptr, c, own)
    moved = former + momentum * (mean - former)
    tl.store(running_mean_ptr + c, moved.to(running_mean_ptr.dtype.element_ty), mask=own)
    former = loaded(running_var_ptr, c, own)
    moved = former + momentum * (var * (rows / (rows - 1.0)) - former)
    tl.store(running_var_ptr + c, moved.to(running_var_ptr.dtype.element_ty), mask=own)
    first = c == 0
    batches = tl.load(batches_ptr + c, mask=first, other=0)
    tl.store(batches_ptr + c, batches + 1, mask=first)


@triton.jit
def grad_tile(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    gate_ptr,
    grad_mean_ptr,
    at_grad,
    at_x,
    at_gate,
    inside,
    mean,
    scale,
    bias,
    pixels,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
):
    """A tile's input less the mean, and the gradient of the norm's output y.

    That comes from the gradient of ``act(y)``, or with GATED of ``act(y) * gate`` and of the mean of ``act(y)``.
    """
    centred = loaded(x_ptr, at_x, inside) - mean[:, None]
    grad = loaded(grad_ptr, at_grad, inside)
    if GATED:
        grad = grad * loaded(gate_ptr, at_gate, inside) + loaded(grad_mean_ptr, at_gate, inside) / pixels
    return centred, grad * act_slope(normed(centred, scale, bias), ACT)
