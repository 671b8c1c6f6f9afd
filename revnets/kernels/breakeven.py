"""From which sparsity on a layer trains faster on the kernel than on torch's dense loops: measured once, then kept.

What a layer gains depends on its shape, its zeros, the layout, the threads and the machine. So each case is timed,
forward pass and gradients on both ways, when it first comes up: some tens of milliseconds. Sizes are rounded, so that a
network of many sizes of images has few cases. The kernel has to be faster in either layout, whichever the input has:
reversible networks may compute a layer again in the other. Verdicts are kept beside the compiled kernel: while they
are, the same layer takes the same way in every run on a machine, which runs that resume to the same bits rely on.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
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
from .compiler import turn
from .masks import mask_serves, product
from .training import Structure
from .windows import MAX_FRAME, frame_bytes, structure_of

_DENSITIES = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
_SIDE = 64  # of an image, at most, if the window fits in: larger ones are measured as more of these
_PRODUCTS = 2**27  # of a dense forward pass that is measured, about: fewer images than there are will do
_ROUNDS = (2, 5)  # at least, where it is clear and where it is not
_SECONDS = 3e-3  # likewise, within _MOST rounds: the first ones of a small layer are not what it takes among others
_MOST = 50
_CLEAR = 1.5  # times as fast or as slow: no more rounds
_MARGIN = 1.1  # by which the kernel has to be faster
_OVERHEAD = 2e-5  # seconds a forward pass, and its gradients, take longer to find the kernel and to be differentiated

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
        windows = zip(geometry.kernel_size, geometry.padding, geometry.dilation, strict=True)
        least = [dilation * (k - 1) + 1 - 2 * pad for k, pad, dilation in windows]  # for one output
        height, width = (max(min(_rounded(side), _SIDE), fits) for side, fits in zip(sides, least, strict=True))
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


def pays(structure: Structure, x: Tensor, linear: bool) -> bool:
    """Whether the kernel trains a layer faster than torch's dense loops with a mask over the weight, in any layout.

    The first time a case is measured; of one that stays dense, a line is logged. So does one whose frames would hold
    too much memory.

    Args:
        structure: of the layer's mask.
        x: its input, ``(N, C, H, W)``, or ``(..., features)`` of a linear layer.
        linear: whether it is one.
    """
    threads = torch.get_num_threads()
    size = (x.numel() // x.shape[-1], 1, 1) if linear else (len(x), x.shape[2], x.shape[3])
    key = (size, linear, threads)
    if key not in structure.verdicts:
        layouts = (True,) if size[1:] == (1, 1) else (False, True)  # those of a pixel are one
        structure.verdicts[key] = _frame_fits(structure.geometry, *size[1:]) and all(
            _pays(Case.of(structure.geometry, size, structure.density, by_pixel, linear, threads))
            for by_pixel in layouts
        )
    return structure.verdicts[key]


@functools.cache
def _frame_fits(geometry: Geometry, height: int, width: int) -> bool:
    """Whether a thread may hold an image of this size in its frame."""
    found = frame_bytes(geometry, height, width)
    if found > MAX_FRAME:
        _log.info(
            "stays dense: %d -> %d @ %dx%d: a frame of %.0f MB for each thread, at most %.0f",
            *(geometry.in_channels, geometry.out_channels, height, width, found / 1e6, MAX_FRAME / 1e6),
        )
    return found <= MAX_FRAME


@functools.cache
def _pays(case: Case) -> bool:
    kernel, dense = _kept().get(repr(case)) or _keep(case, _measured(case))
    if _MARGIN * kernel <= dense:
        return True
    _log.info("stays dense: %s: %.2f ms, on the kernel %.2f ms", case, 1e3 * dense, 1e3 * kernel)
    return False


# --- measuring -------------------------------------------------------------------------------------------------------


def _measured(case: Case) -> tuple[float, float]:
    """Seconds of a training step of the layer, on the kernel and dense: of each pass the least of a few, by turns."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        steps = _steps(case)
        passes = [each for step in steps for each in step]
        found: list[list[float]] = [[] for _ in passes]
        for each in passes:
            each()
        number, spent, clear = 0, 0.0, False
        while number < _ROUNDS[not clear] or (spent < _SECONDS and number < _MOST):
            for each, times in zip(passes, found, strict=True):
                times.append(_seconds(each, case.threads))
            number, spent = number + 1, spent + sum(times[-1] for times in found)
            forward, *others = map(min, found)
            kernel, dense = _worse(forward + _OVERHEAD, *others)
            clear = not 1 / _CLEAR < kernel / dense < _CLEAR
    return kernel, dense


def _worse(kernel: float, kernel_back: float, dense: float, dense_back: float) -> tuple[float, float]:
    """Of a step with one forward pass, and with two, as reversible networks make: that in which the kernel gains less.

    Example:
        >>> _worse(3.0, 2.0, 1.0, 9.0)
        (8.0, 11.0)
    """
    once = kernel + kernel_back, dense + dense_back
    twice = once[0] + kernel, once[1] + dense
    return max(once, twice, key=lambda found: found[0] / found[1])


def _seconds(step: Callable[[], Any], threads: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter  # other programs do not count
    start = clock()
    step()
    return clock() - start


Passes = tuple[Callable[[], Any], Callable[[], Any]]


def _steps(case: Case) -> tuple[Passes, Passes]:
    """The layer's two passes, on the kernel and dense. Random numbers of its own: the program's go on as if without."""
    g, (n, height, width) = case.geometry, case.size
    numbers: dict[str, Any] = {"dtype": torch.float32, "generator": torch.Generator().manual_seed(0)}
    shape = (g.out_channels, g.in_channels // g.groups, *g.kernel_size)
    layout = torch.channels_last if case.by_pixel else torch.contiguous_format
    mask = torch.rand(shape, **numbers) < case.density
    weight = torch.randn(shape, **numbers).mul_(mask)
    x = torch.randn(n, g.in_channels, height, width, **numbers).contiguous(memory_format=layout)
    dy = torch.randn(n, g.out_channels, *g.output_size(height, width), **numbers)
    dy = dy.contiguous(memory_format=layout)
    structure = structure_of(mask, g)

    kept = structure.values(weight)

    def forward() -> Any:
        return structure.convolve(x, structure.values(weight))

    def backward() -> Any:
        return structure.grads(dy, x, kept, weight.shape, (True, True, False))

    return (forward, backward), _dense_linear(x, weight, mask, dy) if case.linear else _dense(g, x, weight, mask, dy)


def _dense(g: Geometry, x: Tensor, weight: Tensor, mask: Tensor, dy: Tensor) -> Passes:
    used = weight * mask
    numbers = (g.stride, g.padding, g.dilation)

    def forward() -> Any:
        return F.conv2d(x, _product(weight, mask), None, *numbers, g.groups)

    def backward() -> Any:
        more = (None, *numbers, False, [0, 0], g.groups, [True, True, False])
        grads = torch.ops.aten.convolution_backward(dy, x, used, *more)
        return grads[0], _product(grads[1], mask)

    return forward, backward


def _dense_linear(x: Tensor, weight: Tensor, mask: Tensor, dy: Tensor) -> Passes:
    x, dy, weight, mask = x.flatten(1), dy.flatten(1), weight.flatten(1), mask.flatten(1)
    used = weight * mask

    def forward() -> Any:
        return F.linear(x, _product(weight, mask))

    def backward() -> Any:
        return dy @ used, _product(dy.t() @ x, mask)

    return forward, backward


def _product(weight: Tensor, mask: Tensor) -> Tensor:
    """As of a layer that stays dense."""
    return product(weight, mask) if mask_serves(weight, mask) else weight * mask


# --- kept ------------------------------------------------------------------------------------------------------------


@functools.cache
def _file() -> Path | None:
    """Where verdicts of this kernel and this torch are kept."""
    for folder in folders([]):
        if os.access(folder, os.W_OK):
            return folder / f"breakeven-{kernel_key()[:16]}-{_sources()}-{torch.__version__}.json"
    return None


@functools.cache
def _sources() -> str:
    """What of the Python around the kernel is timed with it, in a few letters."""
    names = ("breakeven", "layouts", "masks", "training", "windows", "frames")
    text = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(text).hexdigest()[:8]


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
    """Write a verdict beside the others; what another process has written of the case meanwhile counts."""
    path = _file()
    if path is None:
        return seconds
    with contextlib.suppress(OSError), turn(path.with_name(f"{path.name}.lock")):
        kept = _kept()
        seconds = kept.setdefault(repr(case), seconds)
        _write(path, kept)
    return seconds


def _write(path: Path, kept: dict[str, tuple[float, float]]) -> None:
    """The whole file, or what it was."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".breakeven-")
    try:
        with open(handle, "w") as file:
            json.dump(kept, file, indent=0)
        os.replace(name, path)
    finally:
        with contextlib.suppress(OSError):  # moved
            os.unlink(name)
