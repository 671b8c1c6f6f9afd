"""FP8 convolutions as Triton kernels: a cast, a product for outputs and input gradients, three for weight gradients.

Maps are pixels by channels, weights outputs by taps by channels, both in FP8 with channels contiguous, their number
(the pitch) a multiple of 16, zeros in the rest: so every load is of 16 bytes. A product is an implicit GEMM: the sum
runs over taps and, within a tap, over blocks of channels, and taps that lie outside of a map are masked. There are no
atomics, and no choice of tiles changes a sum's order: a step of a sum has a number of products that depends on the
shapes alone (``BLOCK_K``), and what it gives is added to the float32 accumulator at once, as Hopper's FP8 units keep
fewer bits than float32 between such additions. Imported at the first use only; launched by ``fp8_conv_triton``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fp8_triton import _fp8_code

# Numbers that only enter addresses: compiled code must not depend on whether they are 1 or multiples of 16.
_MAPS = ("rows", "wide", "top", "scale")
_PRODUCT = (
    *("rows", "high", "wide", "height", "width", "start_y", "start_x", "step_y", "step_x", "tap_y", "tap_x"),
    *("taps", "taps_wide", "all_taps", "first_tap", "next_tap_y", "next_tap_x", "scale"),
)
_COLUMNS = ("lines", "units", "width", "channels", "start_x", "step_x", "tap_x")
_PARTIAL = ("lines", "high", "units", "outputs", "height", "start_y", "step_y", "tap_y", "taps", "taps_wide")
_SUM = ("numbers", "parts", "taps", "taps_wide", "channels", "stride_o", "stride_i", "stride_y", "stride_x", "scale")


@triton.jit
def _as_float(code, E4M3: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 number of an 8-bit code. For the interpreter, which multiplies no FP8; exact."""
    code = code.to(tl.int32)
    if E4M3:  # a float16 that is 2^8 too small
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        x = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((code & 0x7F) == 0x7F, float("nan"), x)
    return (code << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _multiply(a, b, total, A_E4M3: tl.constexpr, B_E4M3: tl.constexpr, DECODED: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + a @ b``, in FP8 with sums in float32; of decoded numbers in the interpreter."""
    if DECODED:
        return tl.dot(_as_float(a, A_E4M3), _as_float(b, B_E4M3), total, input_precision="ieee")
    return tl.dot(a, b, total, max_num_imprecise_acc=a.shape[1])


@triton.jit(do_not_specialize=_MAPS)
def cast_maps(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    rows,  # pixels of all images
    pixels,  # of an image
    wide,  # pixels in a row of an image
    channels,
    pitch,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    top,
    scale,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Clip and cast maps of any strides to ``(rows, pitch)``, zeros behind the channels.

    ``FLAT``: a tile is of one image, whose pixels are evenly spaced, so that the compiler sees which way memory runs.
    """
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    if FLAT:
        tiles = tl.cdiv(pixels, BLOCK_ROWS)
        image = tl.program_id(0) // tiles
        pixel = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        there = pixel < pixels
        row = image.to(tl.int64) * pixels + pixel
        source = image.to(tl.int64) * stride_n + pixel.to(tl.int64) * stride_x
    else:
        row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        there = row < rows
        pixel = row % pixels
        source = row // pixels * stride_n + pixel // wide * stride_y + pixel % wide * stride_x
    inside = there[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + source[:, None] + channel.to(tl.int64)[None, :] * stride_c, mask=inside, other=0.0)
    x = x.to(tl.float32)
    x = tl.where(x > top, top, tl.where(x < -top, -top, x))  # NaN stays: it is on no side
    written = there[:, None] & (channel < pitch)[None, :]
    target = row[:, None] * pitch + channel[None, :]
    tl.store(y_ptr + target, _fp8_code(x * scale, EXPONENT, MANTISSA), mask=written)


@triton.jit(do_not_specialize=_PRODUCT)
def product(  # type: ignore[no-untyped-def]
    x_ptr,  # (images, height, width, pitch)
    w_ptr,  # (outputs, all taps, pitch)
    y_ptr,  # (images, outputs, high, wide), any strides
    rows,  # images * high * wide
    high,
    wide,
    outputs,
    height,
    width,
    pitch,
    start_y,  # where in x the first tap of the first pixel lies
    start_x,
    step_y,  # in x, from pixel to pixel
    step_x,
    tap_y,  # in x, from tap to tap
    tap_x,
    taps,
    taps_wide,
    all_taps,
    first_tap,  # which of the weight's
    next_tap_y,
    next_tap_x,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    scale,
    X_E4M3: tl.constexpr,
    DECODED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output of a convolution, or what a residue class of pixels of the input receives as gradient."""
    tiles = tl.cdiv(outputs, BLOCK_N)  # neighbours share the map, which is large; the weight stays in the cache
    row = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    image, pixel = row // (high * wide), row % (high * wide)
    i, j = pixel // wide, pixel % wide
    y, x = start_y + i * step_y, start_x + j * step_x
    x_start = ((image.to(tl.int64) * height + y) * width + x) * pitch
    w_start = (output.to(tl.int64) * all_taps + first_tap) * pitch
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = tl.cdiv(pitch, BLOCK_K)
    for step in range(taps * blocks):
        tap, channel = step // blocks, (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        down, right = tap // taps_wide, tap % taps_wide
        tap_row, tap_column = y + down * tap_y, x + right * tap_x
        there = (row < rows) & (tap_row >= 0) & (tap_row < height) & (tap_column >= 0) & (tap_column < width)
        shift = ((down * tap_y).to(tl.int64) * width + right * tap_x) * pitch
        a = tl.load(
            x_ptr + (x_start + shift)[:, None] + channel[None, :],
            mask=there[:, None] & (channel < pitch)[None, :],
            other=0.0,
        )
        b = tl.load(
            w_ptr + (w_start + (down * next_tap_y + right * next_tap_x) * pitch)[None, :] + channel[:, None],
            mask=(output < outputs)[None, :] & (channel < pitch)[:, None],
            other=0.0,
        )
        total = _multiply(a, b, total, X_E4M3, True, DECODED)
    target = image.to(tl.int64) * stride_n + i.to(tl.int64) * stride_y + j.to(tl.int64) * stride_x
    target = target[:, None] + (output.to(tl.int64) * stride_c)[None, :]
    written = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(y_ptr + target, (total * scale).to(y_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=_COLUMNS)
def columns(  # type: ignore[no-untyped-def]
    x_ptr,  # (lines, width, pitch), bytes
    t_ptr,  # (taps wide, channels, lines, wide), bytes
    lines,  # of all images
    units,  # wide / ALIGN
    width,
    channels,
    pitch,
    start_x,
    step_x,
    tap_x,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Maps with the pixels contiguous, once for every column of taps: shifted by it, so that none must be unaligned."""
    wide = units * ALIGN
    tap = tl.program_id(2)
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    line, x = place // wide, start_x + (place % wide) * step_x + tap * tap_x
    there = (line < lines) & (x >= 0) & (x < width)
    source = (line.to(tl.int64) * width + x) * pitch
    tile = tl.load(
        x_ptr + source[:, None] + channel[None, :], mask=there[:, None] & (channel < pitch)[None, :], other=0
    )
    target = (tap * channels + channel).to(tl.int64) * lines * wide
    written = (channel < channels)[:, None] & tl.max_constancy(line < lines, ALIGN)[None, :]
    tl.store(t_ptr + target[:, None] + place[None, :], tl.trans(tile), mask=written)


@triton.jit(do_not_specialize=_PARTIAL)
def weight_partials(  # type: ignore[no-untyped-def]
    g_ptr,  # (outputs, lines, wide): the gradient
    t_ptr,  # (taps wide, channels, images * height, wide): the map, shifted
    p_ptr,  # (parts, outputs, taps, channels), float32
    lines,  # images * high
    high,
    units,  # wide / ALIGN
    outputs,
    height,
    channels,
    start_y,
    step_y,
    tap_y,
    taps,
    taps_wide,
    chunk,  # places of a part: a multiple of BLOCK_K
    DECODED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of a weight, summed over a part of the pixels."""
    wide = units * ALIGN
    tiles = tl.cdiv(channels, BLOCK_N)  # neighbours share the gradient
    tile, part = tl.program_id(0), tl.program_id(1)
    tap, channel = (tile // tiles) % taps, (tile % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    output = (tile // (tiles * taps)) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_y = start_y + (tap // taps_wide) * tap_y
    length = lines * wide
    g_start = output.to(tl.int64) * length
    t_start = ((tap % taps_wide) * channels + channel).to(tl.int64) * (lines // high * height * wide)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(tl.minimum(chunk, length - part * chunk), BLOCK_K)):
        place = part * chunk + step * BLOCK_K + tl.arange(0, BLOCK_K)
        line = place // wide
        y = first_y + (line % high) * step_y
        there = tl.max_constancy((line < lines) & (y >= 0) & (y < height), ALIGN)
        source = (line // high * height + y) * wide + place % wide
        source = tl.multiple_of(tl.max_contiguous(source, ALIGN), ALIGN)
        a = tl.load(
            g_ptr + g_start[:, None] + place[None, :],
            mask=(output < outputs)[:, None] & tl.max_constancy(line < lines, ALIGN)[None, :],
            other=0.0,
        )
        b = tl.load(
            t_ptr + t_start[None, :] + source[:, None],
            mask=there[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        total = _multiply(a, b, total, False, True, DECODED)
    target = ((part.to(tl.int64) * outputs + output) * taps + tap) * channels
    written = (output < outputs)[:, None] & (channel < channels)[None, :]
    tl.store(p_ptr + target[:, None] + channel[None, :], total, mask=written)


@triton.jit(do_not_specialize=_SUM)
def sum_partials(  # type: ignore[no-untyped-def]
    p_ptr,  # (parts, outputs, taps, channels), float32
    w_ptr,  # (outputs, channels, taps high, taps wide), any strides
    numbers,  # outputs * taps * channels
    parts,
    taps,
    taps_wide,
    channels,
    stride_o,
    stride_i,
    stride_y,
    stride_x,
    scale,
    BLOCK: tl.constexpr,
):
    """Add the parts, first to last, and put the sum where the weight's gradient has it."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    total = tl.zeros((BLOCK,), tl.float32)
    source = p_ptr + place
    for _ in range(parts):
        total += tl.load(source, mask=inside, other=0.0)
        source += numbers
    channel, tap, output = place % channels, (place // channels) % taps, place // channels // taps
    target = output * stride_o + channel * stride_i + (tap // taps_wide) * stride_y + (tap % taps_wide) * stride_x
    tl.store(w_ptr + target, (total * scale).to(w_ptr.dtype.element_ty), mask=inside)
