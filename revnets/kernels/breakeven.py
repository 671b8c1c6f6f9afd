"""From which sparsity on a layer trains faster on the kernel than on torch's dense loops: measured once, then kept.

What a layer gains depends on its shape, its zeros, the layout, the threads and the machine. So each case is timed,
forward pass and gradients on both ways, when it first comes up: some tens of milliseconds. Sizes are rounded, so that a
network of many sizes of images has few cases. Verdicts are kept beside the compiled kernel: the same layer takes the
same way in every run on a machine, which runs that resume to the same bits rely on.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import Geometry, kernel_key
from .cache import folders
from .training import Structure, by_pixel
from .windows import structure_of

_DENSITIES = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
_SIDE = 64  # of an image, at most: larger ones are measured as more of these
_PRODUCTS = 2**27  # of a dense forward pass that is measured, about: fewer images than there are will do
_ROUNDS = (2, 5)  # at least, at most
_CLEAR = 1.5  # times as fast or as slow: no more rounds
_MARGIN = 1.05  # by which the kernel has to be faster
_OVERHEAD = 4e-5  # seconds that automatic differentiation takes longer for the kernel's functions than for torch's own

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A layer and its input, rounded to what is measured.

    Attributes:
        geometry: of the convolution; a linear layer is one of a pixel.
        size: images, height and width of the input.
        density: share of weights that are there.
        by_pixel: whether the input is channels last.
        linear: whether it is a linear layer.
        threads: of torch and of the kernel.
    """

    geometry: Geometry
    size: tuple[int, int, int]
    density: float
    by_pixel: bool
    linear: bool
    threads: int

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        size: tuple[int, int, int],
        density: float,
        by_pixel: bool,
        linear: bool,
        threads: int = 1,
    ) -> Case:
        """The case that stands for a layer and an input of this size.

        Example:
            >>> case = Case.of(Geometry(64, 64), (8, 200, 334), 0.0966, False, False)
            >>> case.size, case.density
            ((8, 64, 64), 0.1)
        """
        n, *sides = size
        height, width = (min(_rounded(side), _SIDE) for side in sides)
        images = n * sides[0] * sides[1] / (height * width)
        out = geometry.output_size(height, width)
        per_image = geometry.in_channels // geometry.groups * geometry.out_channels * out[0] * out[1]
        per_image *= geometry.kernel_size[0] * geometry.kernel_size[1]
        most = max(1, _PRODUCTS // max(1, per_image))
        place = min(bisect.bisect_left(_DENSITIES, density * 0.999), len(_DENSITIES) - 1)
        count = _rounded(max(1, min(round(images), most)))
        return cls(geometry, (count, height, width), _DENSITIES[place], by_pixel, linear, threads)

    def __str__(self) -> str:
        g, (n, height, width) = self.geometry, self.size
        kind = "linear" if self.linear else f"{g.kernel_size[0]}x{g.kernel_size[1]}, stride {g.stride[0]}"
        kind += f", {g.groups} groups" if g.groups > 1 else ""
        layout = ", channels last" if self.by_pixel and not self.linear else ""
        zeros = f"{100 * (1 - self.density):g}% zeros"
        return f"{g.in_channels} -> {g.out_channels} ({kind}) @ {n}x{height}x{width}{layout}, {zeros}"


def _rounded(number: int) -> int:
    """To three binary digits.

    Example:
        >>> [_rounded(n) for n in (7, 14, 28, 56, 100)]
        [7, 14, 28, 56, 96]
    """
    step = max(1, 1 << max(0, number.bit_length() - 3))
    return (number + step // 2) // step * step


def pays(structure: Structure, x: Tensor) -> bool:
    """Whether the kernel trains a layer faster than torch's dense loops with a mask over the weight.

    The first time a case is measured; of one that stays dense, a line is logged. The layout of the first input of a
    size decides for those that follow: where reversible networks compute a layer again, it may be another.

    Args:
        structure: of the layer's mask.
        x: its input, ``(N, C, H, W)``, or ``(..., features)`` of a linear layer.
    """
    linear, threads = x.ndim != 4, torch.get_num_threads()
    size = (x.numel() // x.shape[-1], 1, 1) if linear else (len(x), x.shape[2], x.shape[3])
    key = (size, linear, threads)
    if key not in structure.verdicts:
        case = Case.of(structure.geometry, size, structure.density, linear or by_pixel(x), linear, threads)
        structure.verdicts[key] = _pays(case)
    return structure.verdicts[key]


@functools.cache
def _pays(case: Case) -> bool:
    kernel, dense = _kept().get(repr(case)) or _keep(case, _measured(case))
    if _MARGIN * kernel <= dense:
        return True
    _log.info("stays dense: %s: %.2f ms, on the kernel %.2f ms", case, 1e3 * dense, 1e3 * kernel)
    return False


# --- measuring -------------------------------------------------------------------------------------------------------


def _measured(case: Case) -> tuple[float, float]:
    """Seconds of a training step of the layer, on the kernel and dense: the least of a few, by turns."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        steps = _steps(case)
        found: tuple[list[float], list[float]] = ([], [])
        for step in steps:
            step()
        for number in range(1, _ROUNDS[1] + 1):
            for step, times in zip(steps, found, strict=True):
                times.append(_seconds(step, case.threads))
            kernel, dense = min(found[0]) + _OVERHEAD, min(found[1])
            if number >= _ROUNDS[0] and not 1 / _CLEAR < kernel / dense < _CLEAR:
                break
    return kernel, dense


def _seconds(step: Callable[[], Any], threads: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter  # other programs do not count
    start = clock()
    step()
    return clock() - start


def _steps(case: Case) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The layer's step on the kernel, and dense. Random numbers of its own: the program's go on as if without."""
    g, (n, height, width) = case.geometry, case.size
    generator = torch.Generator().manual_seed(0)
    shape = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
    layout = torch.channels_last if case.by_pixel else torch.contiguous_format
    mask = torch.rand(shape, generator=generator) < case.density
    weight = torch.randn(shape, generator=generator).mul_(mask)
    x = torch.randn(n, g.in_channels, height, width, generator=generator).contiguous(memory_format=layout)
    dy = torch.randn(n, g.out_channels, *g.output_size(height, width), generator=generator)
    dy = dy.contiguous(memory_format=layout)
    structure = structure_of(mask, g)

    def kernel() -> Any:
        values = structure.values(weight)
        return structure.convolve(x, values), structure.grads(dy, x, values, weight.shape, (True, True, False))

    return kernel, _dense_linear(x, weight, mask, dy) if case.linear else _dense(g, x, weight, mask, dy)


def _dense(g: Geometry, x: Tensor, weight: Tensor, mask: Tensor, dy: Tensor) -> Callable[[], Any]:
    numbers = (g.stride, g.padding, g.dilation)

    def dense() -> Any:
        used = weight * mask
        y = F.conv2d(x, used, None, *numbers, g.groups)
        more = (None, *numbers, False, [0, 0], g.groups, [True, True, False])
        grads = torch.ops.aten.convolution_backward(dy, x, used, *more)
        return y, grads[0], grads[1] * mask

    return dense


def _dense_linear(x: Tensor, weight: Tensor, mask: Tensor, dy: Tensor) -> Callable[[], Any]:
    x, dy, weight, mask = x.flatten(1), dy.flatten(1), weight.flatten(1), mask.flatten(1)

    def dense() -> Any:
        used = weight * mask
        return F.linear(x, used), dy @ used, (dy.t() @ x) * mask

    return dense


# --- kept ------------------------------------------------------------------------------------------------------------


@functools.cache
def _file() -> Path | None:
    """Where verdicts of this kernel and this torch are kept."""
    for folder in folders([]):
        if os.access(folder, os.W_OK):
            return folder / f"breakeven-{kernel_key()[:16]}-{torch.__version__}.json"
    return None


def _kept() -> dict[str, tuple[float, float]]:
    """Verdicts of earlier runs; none where the file is missing or is not what was written."""
    path = _file()
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        if path is not None:
            return {
                str(case): (float(kernel), float(dense))
                for case, (kernel, dense) in json.loads(path.read_text()).items()
            }
    return {}


def _keep(case: Case, seconds: tuple[float, float]) -> tuple[float, float]:
    """Write a verdict beside the others, whole; what another process has written of the case meanwhile counts."""
    path = _file()
    if path is None:
        return seconds
    kept = _kept()
    seconds = kept.setdefault(repr(case), seconds)
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".breakeven-")
        with open(handle, "w") as file:
            json.dump(kept, file, indent=0)
        os.replace(name, path)
    return seconds
