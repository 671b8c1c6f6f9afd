"""Where FP8 pays: munit-scaled layers against bfloat16 and torchao's dynamic scales, forward and backward."""

from __future__ import annotations

import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import MuSConv2d, MuSLinear, fp8_products
from ..layers.fp8 import check_backend, resolve_backend
from ..layers.fp8_break_even import KINDS, device_kind
from ..training.values import COUNT, find_device, reason, refused, words
from .fake import ProfileError
from .memory import synchronize
from .report import write

MODES = ("eager", "compiled")
PLAIN, OURS, TORCHAO = "plain", "mus_fp8", "torchao dynamic"
_SIDE = 16  # of the maps, pixels
_BLOCK_SECONDS = 0.02  # of one measurement at least, so that the clock and launches do not count


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        device: where.
        widths: inputs and outputs of the layers.
        rows: of the products; rounded up to whole maps for convolutions.
        kinds: some of ``KINDS``.
        modes: some of ``MODES``.
        repeats: rounds, in each of which every layer is timed once.
        backend: of FP8 products, see ``MuSLinear``.

    Raises:
        ProfileError: for what does not exist.
    """

    device: torch.device
    widths: Sequence[int]
    rows: Sequence[int]
    kinds: Sequence[str] = KINDS
    modes: Sequence[str] = MODES
    repeats: int = 7
    backend: str | None = None

    def __post_init__(self) -> None:
        for what, given, known in (("kind", self.kinds, KINDS), ("mode", self.modes, MODES)):
            unknown = [one for one in given if one not in known]
            if unknown or not given:
                raise ProfileError(f"unknown {what} {''.join(unknown[:1])!r}: expected some of {', '.join(known)}")
        for what, sizes in (("widths", self.widths), ("rows", self.rows)):
            if not sizes or not all(COUNT.holds(size) for size in sizes):
                raise ProfileError(f"{what} {list(sizes)}: expected some numbers, each {COUNT.words}")
        COUNT.check("repeats", self.repeats)


def parse(device: str, widths: str, rows: str, kinds: str, modes: str, repeats: int, backend: str | None) -> Request:
    """A request from what was typed; empty texts stand for what suits the device.

    Raises:
        ProfileError: for what does not exist here.
    """
    with refused("bench-fp8", ProfileError):
        found = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), here=True)
        device_kind(found)
        check_backend(backend)
        if backend is not None:
            resolve_backend(backend, found, torch.bfloat16)
        numbers = [
            COUNT.read_list(f"--{name}", text) if text else [] for name, text in (("widths", widths), ("rows", rows))
        ]
        chosen = words("kind", kinds, KINDS, blanks=False), words("mode", modes, MODES)
    small = found.type == "cpu"
    return Request(
        found,
        numbers[0] or ([256, 512] if small else [256, 512, 1024, 2048, 4096, 8192]),
        numbers[1] or ([512] if small else [2048, 8192]),
        *chosen,
        repeats,
        backend,
    )


@dataclass(frozen=True)
class Row:
    """One layer measured: median seconds of forward and backward pass, and the median over rounds of its speed-up.

    ``speedup`` is that over the plain layer in the same mode and round. ``backend`` is what multiplied.
    """

    kind: str
    rows: int
    width: int
    mode: str
    layer: str
    backend: str
    seconds: float
    speedup: float


def run(
    request: Request,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    say: Callable[[str], Any] = warnings.warn,
) -> list[Row]:
    """Measure all sizes, one after the other; within a size all layers take turns.

    Args:
        request: what to measure.
        progress: wraps the list of sizes.
        say: gets a sentence for every layer that could not be measured.
    """
    sizes = [(k, r, w) for k in request.kinds for r in request.rows for w in request.widths]
    found: list[Row] = []
    for kind, rows, width in progress(sizes):
        found += _measure(request, kind, rows, width, say)
    return found


def _measure(request: Request, kind: str, rows: int, width: int, say: Callable[[str], Any]) -> list[Row]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with refused(f"{kind} {rows}x{width} cannot be measured on {request.device}", ProfileError):
        x, grad = _inputs(kind, rows, width, request.device)
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    backends: dict[tuple[str, str], str] = {}
    for mode in request.modes:
        for name, make in _LAYERS.items():
            try:
                layer = make(kind, width, request)
                if layer is None:
                    continue
                step = _step(layer, x, grad, compiled=mode == "compiled")
                fp8_products(reset=True)
                step()
                backends[mode, name] = _backend(name, layer, mode, request)
                step()
            except Exception as error:  # whatever a compiler or another library may raise
                if name == PLAIN:
                    raise ProfileError(f"{kind} {width}, {mode}: {reason(error)}") from error
                say(f"{kind} {rows}x{width}, {mode}: {name} was not measured: {reason(error)}")
                continue
            steps[mode, name] = step
    counts = {key: _count(step, request.device) for key, step in steps.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(request.repeats):
        for key, step in steps.items():
            seconds[key].append(_timed(step, counts[key], request.device))
    return [
        Row(
            *(kind, rows, width, mode, name, backends[mode, name]),
            seconds=statistics.median(taken),
            speedup=statistics.median(p / t for p, t in zip(seconds[mode, PLAIN], taken, strict=True)),
        )
        for (mode, name), taken in seconds.items()
    ]


def _inputs(kind: str, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output, in bfloat16, of unit variance."""
    shape = (rows, width) if kind == "linear" else (-(-rows // _SIDE**2), width, _SIDE, _SIDE)
    x, grad = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    if kind != "linear":
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return x.requires_grad_(), grad


def _plain(kind: str, width: int, request: Request) -> nn.Module:
    return nn.Linear(width, width, bias=False) if kind == "linear" else nn.Conv2d(width, width, 1, bias=False)


def _ours(kind: str, width: int, request: Request) -> nn.Module:
    options: dict[str, Any] = {"bias": False, "fp8": True, "backend": request.backend}
    return MuSLinear(width, width, **options) if kind == "linear" else MuSConv2d(width, width, 1, **options)


def _torchao(kind: str, width: int, request: Request) -> nn.Module | None:
    """torchao converts linear layers only."""
    if kind != "linear":
        return None
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        return None
    return convert_to_float8_training(nn.Sequential(_plain(kind, width, request)).to(torch.bfloat16))


_LAYERS: dict[str, Callable[[str, int, Request], nn.Module | None]] = {PLAIN: _plain, OURS: _ours, TORCHAO: _torchao}


def _step(layer: nn.Module, x: Tensor, grad: Tensor, compiled: bool) -> Callable[[], None]:
    layer = layer.to(device=x.device, dtype=torch.bfloat16)
    if x.dim() == 4:
        layer = layer.to(memory_format=torch.channels_last)
    call: Any = torch.compile(layer, dynamic=False) if compiled else layer

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        call(x).backward(grad)

    return step


def _backend(name: str, layer: Any, mode: str, request: Request) -> str:
    """What really multiplied: counted where code is eager; compiled code keeps no count and takes what eager takes."""
    if name != OURS:
        return {PLAIN: "bfloat16", TORCHAO: "its own"}[name]
    if mode == "compiled":
        return resolve_backend(request.backend, request.device, torch.bfloat16)
    return ", ".join(sorted(fp8_products(reset=True)))


def _timed(step: Callable[[], None], count: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / count


def _count(step: Callable[[], None], device: torch.device) -> int:
    """Steps of one measurement."""
    return max(1, min(200, round(_BLOCK_SECONDS / max(_timed(step, 1, device), 1e-6))))


def break_even(rows: Sequence[Row]) -> dict[str, list[tuple[int, int | None]]]:
    """The least width from which on FP8 is faster at all larger ones, in every mode measured, by rows; None for never.

    Example:
        >>> def row(width, layer, speedup):
        ...     return Row("linear", 64, width, "eager", layer, "", 1.0, speedup)
        >>> break_even([row(256, OURS, 1.1), row(512, OURS, 0.9), row(1024, OURS, 1.2), row(2048, OURS, 1.4)])
        {'linear': [(64, 1024)], '1x1 conv': []}
    """
    found: dict[str, list[tuple[int, int | None]]] = {kind: [] for kind in KINDS}
    for kind, count in sorted({(r.kind, r.rows) for r in rows}):
        least: int | None = None
        same = [r for r in rows if (r.kind, r.rows, r.layer) == (kind, count, OURS)]
        for width in sorted({r.width for r in same}, reverse=True):
            if any(r.speedup <= 1 for r in same if r.width == width):
                break
            least = width
        found[kind].append((count, least))
    return found


def describe(request: Request) -> str:
    """The machine and versions, in words."""
    where = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    if request.device.type != "cpu":
        where = torch.get_device_module(request.device).get_device_name(request.device)
    return f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def print_rows(rows: Sequence[Row], request: Request) -> None:
    """The measurements, and the break-even table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Forward and backward in bfloat16, medians of {request.repeats} ({describe(request)})")
    words = ("kind", "mode", "layer", "multiplied by")
    for column in ("kind", "rows", "width", "mode", "layer", "multiplied by", "ms", "speed-up over plain"):
        table.add_column(column, justify="left" if column in words else "right")
    for r in rows:
        sizes = (r.kind, str(r.rows), str(r.width))
        table.add_row(*sizes, r.mode, r.layer, r.backend, f"{1e3 * r.seconds:.3f}", f"{r.speedup:.2f}")
    console = Console(width=140)
    console.print(table)
    if any(r.layer == OURS and "emulate" in r.backend for r in rows):
        console.print("FP8 is EMULATED here: the speed of mus_fp8 says nothing of FP8 units", style="bold")
    limits = Table(title=f"Break-even on {device_kind(request.device)}: mus_fp8 is faster from this width on")
    for column in ("kind", "rows", "width"):
        limits.add_column(column)
    for kind, points in break_even(rows).items():
        for count, width in points:
            limits.add_row(kind, str(count), "at no width measured" if width is None else str(width))
    console.print(limits)


def save(rows: Sequence[Row], request: Request, path: Path) -> None:
    """Write what ``mus_fp8:auto`` reads as a table, complete or not at all."""
    data = {
        "device": device_kind(request.device),
        "machine": describe(request),
        "break_even": break_even(rows),
        "rows": [asdict(row) for row in rows],
    }
    write(path, lambda temporary: temporary.write_text(json.dumps(data, indent=2) + "\n"))
