"""Launches of the FP8 convolution kernels: geometry, tiles, and the choice among tiles by time. Needs Triton."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..fp8_triton import _FORMATS, _on
from .fp8_conv_kernels import cast_maps, product, sum_partials, weight_partials

ALIGNMENT = 16
"""Channels are padded to a multiple of it, with zeros, when they are cast."""

Tile = tuple[int, int, int, int]
"""BLOCK_M, BLOCK_N, warps, stages of the software pipeline."""

TILES: tuple[Tile, ...] = ((128, 128, 8, 3), (128, 64, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4))
"""What is tried for each product and size; the first where nothing can be timed."""

MAXIMUM = 2**30
"""Of the pixels of a batch, on either side: within a batch they are counted in 32 bits, addresses are of 64."""

_CAST_ROWS, _CAST_CHANNELS = 64, 64
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


def cast(x: Tensor, dtype: torch.dtype, scale: float = 1.0, transposed: bool = False) -> tuple[Tensor, Tensor | None]:
    """Maps clipped and cast as ``fp8.quantize`` does, channels last, in one pass over ``x`` whatever its strides.

    Args:
        x: ``(N, C, H, W)``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale: a static factor.
        transposed: also return the transpose.

    Returns:
        ``(N, H, W, C')`` and, on request, ``(C, (N H W)')``; C' and (N H W)' are padded with zeros.
    """
    n, c, h, w = x.shape
    rows, pitch = n * h * w, padded(c)
    columns = padded(rows)
    y = torch.empty(n, h, w, pitch, dtype=torch.uint8, device=x.device)
    t = torch.empty(c, columns, dtype=torch.uint8, device=x.device) if transposed else None
    if rows and c:
        grid = (triton.cdiv(columns if transposed else rows, _CAST_ROWS), triton.cdiv(pitch, _CAST_CHANNELS))
        sizes = (rows, h * w, w, c, pitch, columns, *x.stride(), torch.finfo(dtype).max / scale, scale)
        with _on(x.device):
            cast_maps[grid](
                x, y, y if t is None else t, *sizes, *_FORMATS[dtype], transposed, _CAST_ROWS, _CAST_CHANNELS
            )
    return y.view(dtype), None if t is None else t.view(dtype)


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
    _launch_product(x, weight, y, (-py, -px), (sy, sx), (dy, dx), (high, wide), (0, 0), (1, 1), scale)


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
    for first_y in range(min(sy, grad_x.shape[2])):
        for first_x in range(min(sx, grad_x.shape[3])):
            (tap_y, start_y, step_y, count_y), (tap_x, start_x, step_x, count_x) = (
                _met(first_y, sy, py, dy, high),
                _met(first_x, sx, px, dx, wide),
            )
            _launch_product(
                *(grad, weight, grad_x[:, :, first_y::sy, first_x::sx]),
                *((start_y, start_x), (1, 1), (-step_y * dy // sy, -step_x * dx // sx)),
                *((count_y, count_x), (tap_y, tap_x), (step_y, step_x), scale),
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
    grad: Tensor, x: Tensor, grad_weight: Tensor, outputs: Sequence[int], geometry: Sequence[Sequence[int]], scale: float
) -> None:
    """Gradient of a convolution's weight: sums over parts of the pixels, then their sum, in an order of its own.

    Args:
        grad: ``(outputs, (N H' W')')`` in FP8.
        x: ``(N, H, W, C')`` in e4m3.
        grad_weight: ``(outputs, C, k, k)``, any strides: written.
        outputs: H' and W'.
        geometry: stride, padding, dilation.
        scale: of the result.
    """
    (sy, sx), (py, px), (dy, dx) = geometry
    (channels_out, channels, high, wide), (images, height, width, pitch) = grad_weight.shape, x.shape
    rows, taps = images * math.prod(outputs), high * wide
    if not (rows and grad_weight.numel()):
        grad_weight.zero_()
        return
    step = step_of_sum(rows)
    parts, chunk = _parts(rows, triton.cdiv(channels_out, _NOMINAL) * triton.cdiv(pitch, _NOMINAL) * taps, step)
    sums = torch.empty(parts, channels_out, taps, pitch, dtype=torch.float32, device=x.device)
    sizes = (rows, *outputs, channels_out, height, width, pitch, grad.shape[1])
    places = (-py, -px, sy, sx, dy, dx, taps, wide, chunk)
    operands = _loadable(grad), _loadable(x), sums

    def launch(tile: Tile) -> None:
        m, n, warps, stages = tile
        grid = (triton.cdiv(channels_out, m) * triton.cdiv(pitch, n) * taps, parts)
        constants = (interpreted(), step, m, n)
        weight_partials[grid](*operands, *sizes, *places, *constants, num_warps=warps, num_stages=stages)

    with _on(x.device):
        launch(_tile(launch, x.device, ("weight", _octave(rows), channels_out, pitch, taps)))
        numbers = channels_out * taps * pitch
        sum_partials[(triton.cdiv(numbers, _SUM_BLOCK),)](
            *(sums, grad_weight, numbers, parts, taps, wide, channels, pitch, *grad_weight.stride(), scale, _SUM_BLOCK)
        )


def _parts(rows: int, tiles: int, step: int) -> tuple[int, int]:
    """How many parts a sum over rows has, and the rows of each: enough programs for a GPU, at least 8 steps each."""
    parts = max(1, min(triton.cdiv(_PROGRAMS, tiles), rows // (8 * step)))
    chunk = triton.cdiv(triton.cdiv(rows, parts), step) * step
    return triton.cdiv(rows, chunk), chunk


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
    """What a kernel gets for a tensor in FP8: the interpreter decodes bytes."""
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
