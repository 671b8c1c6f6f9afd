"""Launches of the FP8 convolution kernels: geometry, tiles, and the choice among tiles by time. Needs Triton."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product as product_of
from typing import Any

import torch
import triton
from torch import Tensor

from .fp8 import ALIGNMENT
from .fp8_conv_kernels_triton import cast_maps, columns, product, sum_partials, weight_partials
from .fp8_triton import _FORMATS, _on

Tile = tuple[int, int, int, int]
"""BLOCK_M, BLOCK_N, warps, stages of the software pipeline."""

TILES: tuple[Tile, ...] = ((128, 128, 8, 3), (128, 64, 8, 4), (64, 128, 4, 4), (64, 64, 4, 4))
"""What is tried for each product and size; the first where nothing can be timed."""

WORKSPACE = 2**27
"""Bytes that a weight gradient may use for the transposed maps of some images; at least those of one."""

_ROWS, _CHANNELS = 64, 64  # of a cast's tile
_SUM_BLOCK = 1024
_PROGRAMS = 264  # that weight gradients are cut into, at least: twice the multiprocessors of an H100
_NOMINAL = 128  # tile that this count is made with, as a sum's order must not depend on the tile
_ROUNDS = 3  # timed, of which the fastest counts
_FASTEST: dict[tuple[Any, ...], Tile] = {}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPUs and without FP8 units."""
    return not isinstance(product, triton.runtime.JITFunction)


def padded(channels: int) -> int:
    """Channels with the zeros behind them."""
    return -(-channels // ALIGNMENT) * ALIGNMENT


def step_of_sum(length: int, most: int = 128) -> int:
    """How many products a step of a sum has: by the shape alone, so that no choice of tiles changes its order.

    Example:
        >>> step_of_sum(16), step_of_sum(48), step_of_sum(1000)
        (32, 64, 128)
    """
    return min(max(triton.next_power_of_2(length), 32), most)  # FP8 units take 32 at least


@contextmanager
def _rounding(y: Tensor) -> Iterator[Tensor]:
    """What a kernel writes ``y`` to: the interpreter would cut numbers to bfloat16, where FP8 units round them."""
    if not interpreted() or y.dtype == torch.float32:
        yield y
        return
    wide = torch.empty_like(y, dtype=torch.float32)
    yield wide
    y.copy_(wide)


def cast(x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Maps clipped and cast as ``fp8.quantize`` does, channels last, in one pass over ``x`` whatever its strides.

    Args:
        x: ``(N, C, H, W)``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale: a static factor.

    Returns:
        ``(N, H, W, C')``, where C' is padded with zeros.
    """
    n, c, h, w = x.shape
    rows, pitch = n * h * w, padded(c)
    y = torch.empty(n, h, w, pitch, dtype=torch.uint8, device=x.device)
    if y.numel():
        stride_y, stride_x = x.stride()[2:]
        flat = 2 * h * w >= _ROWS and (h == 1 or stride_y == w * stride_x)
        tiles = n * triton.cdiv(h * w, _ROWS) if flat else triton.cdiv(rows, _ROWS)
        grid = (tiles, triton.cdiv(pitch, _CHANNELS))
        sizes = (rows, h * w, w, c, pitch, *x.stride(), torch.finfo(dtype).max / scale, scale)
        with _on(x.device):
            cast_maps[grid](x, y, *sizes, *_FORMATS[dtype], flat, _ROWS, _CHANNELS)
    return y.view(dtype)


def convolve(x: Tensor, weight: Tensor, y: Tensor, geometry: Sequence[Sequence[int]], scale: float) -> None:
    """Output of a convolution.

    Args:
        x: ``(N, H, W, C')`` in FP8.
        weight: ``(outputs, k, k, C')`` in e4m3.
        y: ``(N, outputs, H', W')``, any strides: written.
        geometry: stride, padding, dilation.
        scale: of the result.
    """
    (sy, sx), (py, px), (dy, dx) = geometry
    _, high, wide, _ = weight.shape
    with _rounding(y) as written:
        _launch_product(x, weight, written, (-py, -px), (sy, sx), (dy, dx), (high, wide), (0, 0), (1, 1), scale)


def convolve_backward(
    grad: Tensor, weight: Tensor, grad_x: Tensor, geometry: Sequence[Sequence[int]], scale: float
) -> None:
    """Gradient of a convolution's input: for each class of pixels, modulo the stride, a product over the taps it meets.

    Args:
        grad: ``(N, H', W', outputs')`` in FP8.
        weight: ``(C, k, k, outputs')`` in e4m3.
        grad_x: ``(N, C, H, W)``, any strides: written.
        geometry: stride, padding, dilation.
        scale: of the result.
    """
    (sy, sx), (py, px), (dy, dx) = geometry
    _, high, wide, _ = weight.shape
    with _rounding(grad_x) as written:
        for first_y, first_x in product_of(range(min(sy, grad_x.shape[2])), range(min(sx, grad_x.shape[3]))):
            tap_y, start_y, step_y, count_y = _met(first_y, sy, py, dy, high)
            tap_x, start_x, step_x, count_x = _met(first_x, sx, px, dx, wide)
            _launch_product(
                grad,
                weight,
                written[:, :, first_y::sy, first_x::sx],
                start=(start_y, start_x),
                steps=(1, 1),
                next_tap=(-step_y * dy // sy, -step_x * dx // sx),
                taps=(count_y, count_x),
                first_tap=(tap_y, tap_x),
                tap_steps=(step_y, step_x),
                scale=scale,
            )


def _met(first: int, stride: int, padding: int, dilation: int, taps: int) -> tuple[int, int, int, int]:
    """Taps through which pixels ``first``, ``first + stride``, ... of an input have a part in an output.

    Returns:
        the first such tap, the output that it leads from ``first`` to, the step to the next tap, and their number.

    Example:
        >>> _met(0, 2, 1, 1, 3), _met(1, 2, 1, 1, 3)  # even pixels meet the middle tap, odd ones the first and the last
        ((1, 0, 2, 1), (0, 1, 2, 2))
    """
    step = stride // math.gcd(stride, dilation)
    tap = next((t for t in range(min(step, taps)) if (first + padding - t * dilation) % stride == 0), None)
    if tap is None:
        return 0, 0, step, 0
    return tap, (first + padding - tap * dilation) // stride, step, len(range(tap, taps, step))


def convolve_weight(
    grad: Tensor, x: Tensor, grad_weight: Tensor, geometry: Sequence[Sequence[int]], scale: float
) -> None:
    """Gradient of a convolution's weight: sums over parts of the pixels, then their sum, in an order of its own.

    FP8 units want what is summed over contiguous: pixels, here. So maps are transposed, the input once for every column
    of taps, a few images at a time, in ``WORKSPACE`` bytes.

    Args:
        grad: ``(N, H', W', outputs')`` in FP8.
        x: ``(N, H, W, C')`` in e4m3.
        grad_weight: ``(outputs, C, k, k)``, any strides: written.
        geometry: stride, padding, dilation.
        scale: of the result.
    """
    (images, high, out_wide, _), height, (outputs, channels, *kernel) = grad.shape, x.shape[1], grad_weight.shape
    if not (grad.numel() and x.numel() and grad_weight.numel()):
        grad_weight.zero_()
        return
    align = _alignment(out_wide)
    wide, taps = -(-out_wide // align) * align, math.prod(kernel)
    step = step_of_sum(high * wide)
    together = max(1, min(images, WORKSPACE // (kernel[1] * channels * height * wide + outputs * high * wide)))
    tiles = triton.cdiv(outputs, _NOMINAL) * triton.cdiv(channels, _NOMINAL) * taps
    parts, chunk = _parts(together * high * wide, tiles, step)
    groups = range(0, images, together)
    sums = torch.empty(len(groups) * parts, outputs, taps, channels, dtype=torch.float32, device=x.device)
    used = 0
    with _on(x.device):
        for first in groups:
            some = slice(first, first + together)
            used += _launch_partials(grad[some], x[some], sums[used:], kernel, geometry, (align, wide, step, chunk))
        numbers = outputs * taps * channels
        with _rounding(grad_weight) as written:
            sizes = (numbers, used, taps, kernel[1], channels, *written.stride())
            sum_partials[(triton.cdiv(numbers, _SUM_BLOCK),)](sums, written, *sizes, scale, _SUM_BLOCK)


def _launch_partials(
    grad: Tensor,
    x: Tensor,
    sums: Tensor,
    kernel: Sequence[int],
    geometry: Sequence[Sequence[int]],
    sizes: tuple[int, int, int, int],
) -> int:
    """Parts of a weight's gradient from some images; returns how many."""
    (sy, sx), (py, px), (dy, dx) = geometry
    align, wide, step, chunk = sizes
    (images, high, _, _), height = grad.shape, x.shape[1]
    _, outputs, taps, channels = sums.shape
    g = _columns(grad, outputs, 1, wide, align, (0, 1, 0))
    t = _columns(x, channels, kernel[1], wide, align, (-px, sx, dx))
    lines = images * high
    parts = triton.cdiv(lines * wide, chunk)
    numbers = (lines, high, wide // align, outputs, height, channels, -py, sy, dy, taps, kernel[1], chunk)

    def launch(tile: Tile) -> None:
        m, n, warps, stages = tile
        grid = (triton.cdiv(outputs, m) * triton.cdiv(channels, n) * taps, parts)
        constants = (interpreted(), align, step, m, n)
        weight_partials[grid](
            *(_loadable(g), _loadable(t), sums, *numbers, *constants), num_warps=warps, num_stages=stages
        )

    launch(_tile(launch, x.device, ("weight", _octave(lines * wide), align, outputs, channels, taps)))
    return parts


def _columns(x: Tensor, channels: int, copies: int, wide: int, align: int, shift: tuple[int, int, int]) -> Tensor:
    """``(copies, channels, lines, wide)``: the pixels of each line from ``start + copy * tap`` on, in steps."""
    images, height, width, pitch = x.shape
    lines = images * height
    t = torch.empty(copies, channels, lines, wide, dtype=torch.uint8, device=x.device)
    grid = (triton.cdiv(lines * wide, _ROWS), triton.cdiv(channels, _CHANNELS), copies)
    sizes = (lines, wide // align, width, channels, pitch, *shift)
    columns[grid](x.contiguous().view(torch.uint8), t, *sizes, align, _ROWS, _CHANNELS)
    return t.view(x.dtype)


def _alignment(wide: int) -> int:
    """Pixels that a line is padded to a multiple of: those of a load; half as many where that leaves fewer zeros."""
    return 16 if -(-wide // 16) * 16 == -(-wide // 8) * 8 else 8


def _parts(places: int, tiles: int, step: int) -> tuple[int, int]:
    """How many parts a sum over places has, and the places of each: enough programs for a GPU, of 8 steps at least."""
    parts = max(1, min(triton.cdiv(_PROGRAMS, tiles), places // (8 * step)))
    chunk = triton.cdiv(triton.cdiv(places, parts), step) * step
    return triton.cdiv(places, chunk), chunk


def _launch_product(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    start: tuple[int, int],
    steps: tuple[int, int],
    next_tap: tuple[int, int],
    taps: tuple[int, int],
    first_tap: tuple[int, int],
    tap_steps: tuple[int, int],
    scale: float,
) -> None:
    """``product``, of the pixels that ``y`` has; positions are pairs, down and right."""
    (images, outputs, high, wide), (_, height, width, pitch) = y.shape, x.shape
    rows = images * high * wide
    if not (rows and outputs):
        return
    if not (x.numel() and math.prod(taps)):
        y.zero_()
        return
    all_wide = weight.shape[2]
    sizes = (rows, high, wide, outputs, height, width, pitch, *start, *steps, *next_tap, math.prod(taps), taps[1])
    places = (weight.shape[1] * all_wide, first_tap[0] * all_wide + first_tap[1], tap_steps[0] * all_wide, tap_steps[1])
    operands = _loadable(x), _loadable(weight), y
    constants = (x.dtype == torch.float8_e4m3fn, interpreted(), step_of_sum(pitch))

    def launch(tile: Tile) -> None:
        m, n, warps, stages = tile
        grid = (triton.cdiv(rows, m) * triton.cdiv(outputs, n),)
        product[grid](
            *(*operands, *sizes, *places, *y.stride(), scale, *constants, m, n), num_warps=warps, num_stages=stages
        )

    with _on(x.device):
        launch(_tile(launch, x.device, ("product", x.dtype, y.dtype, _octave(rows), outputs, pitch, math.prod(taps))))


def _loadable(x: Tensor) -> Tensor:
    """What a kernel gets for a tensor in FP8, contiguous as the cast made it; the interpreter decodes bytes."""
    x = x.contiguous()
    return x.view(torch.uint8) if interpreted() else x


def _octave(rows: int) -> int:
    """Sizes within a factor of two share their tile, so that batches of many sizes are not timed one by one."""
    return rows.bit_length()


# --- which tile ------------------------------------------------------------------------------------------------------


def _tile(launch: Callable[[Tile], None], device: torch.device, key: tuple[Any, ...]) -> Tile:
    """The fastest of ``TILES`` for a product, timed at the first of its size; the numbers do not depend on it.

    Not timed, and the first: in the interpreter, and while a CUDA graph is captured.
    """
    key = (device, *key)
    if key not in _FASTEST:
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return TILES[0]
        _FASTEST[key] = _timed(launch)
    return _FASTEST[key]


def _timed(launch: Callable[[Tile], None]) -> Tile:
    from triton.runtime.errors import OutOfResources

    found: list[tuple[float, Tile]] = []
    for tile in TILES:
        try:
            launch(tile)
        except OutOfResources:  # of shared memory, on smaller GPUs
            continue
        times = []
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launch(tile)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        found.append((min(times), tile))
    return min(found)[1] if found else TILES[-1]
