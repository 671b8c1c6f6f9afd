"""Where FP8 pays: munit-scaled layers against bfloat16 and torchao's dynamic scales, forward and backward."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..arguments import number, path, text
from ..layers import MuSConv2d, MuSLinear, fp8_products
from ..layers.munit.break_even import KINDS, device_kind
from ..layers.munit.fp8 import check_backend, resolve_backend
from ..layers.munit.fp8_conv import choose
from ..profiling.command import track
from ..profiling.fake import ProfileError
from ..profiling.memory import synchronize
from ..training.errors import reason, refused
from ..training.options.values import COUNT, find_device, words
from ..training.places import check_file
from .fp8_rows import OURS, PLAIN, TORCHAO, TRITON, Row, break_even, describe, print_rows, write_table

__all__ = [
    "OURS",
    "PLAIN",
    "TORCHAO",
    "TRITON",
    "Request",
    "Row",
    "bench_fp8_command",
    "break_even",
    "describe",
    "parse",
    "print_rows",
    "run",
    "write_table",
]

MODES = ("eager", "compiled")
_SIDES = (56, 16)  # of the maps, pixels: the first that divides the rows into whole maps, or the last
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
    with refused("bench-fp8", kind=ProfileError):
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
    found: list[Row] = []
    for kind, rows, width in progress([(k, r, w) for k in request.kinds for r in request.rows for w in request.widths]):
        found += _measure(request, kind, rows, width, say)
    return found


@dataclass
class _Timed:
    """A layer under measurement: what to time, how often, and what was found, both passes and forward alone."""

    backend: str
    steps: tuple[Callable[[], None], Callable[[], None]]
    counts: tuple[int, int] = (1, 1)
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def measure(self, device: torch.device) -> None:
        for step, count, found in zip(self.steps, self.counts, self.seconds, strict=True):
            found.append(_timed(step, count, device))


def _measure(request: Request, kind: str, rows: int, width: int, say: Callable[[str], Any]) -> list[Row]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with refused(f"{kind} {rows}x{width} cannot be measured on {request.device}", kind=ProfileError):
        x, grad = _inputs(kind, rows, width, request.device)
    timed: dict[tuple[str, str], _Timed] = {}
    for mode in request.modes:
        for name, make in _LAYERS.items():
            try:
                layer = make(kind, width, request)
                if layer is not None:
                    timed[mode, name] = _prepared(name, layer, x, grad, mode, request)
            except Exception as error:  # whatever a compiler or another library may raise
                if name == PLAIN:
                    raise ProfileError(f"{kind} {width}, {mode}: {reason(error)}") from error
                say(f"{kind} {rows}x{width}, {mode}: {name} was not measured: {reason(error)}")
    for one in timed.values():
        one.counts = tuple(_count(step, request.device) for step in one.steps)  # type: ignore[assignment]
    for _ in range(request.repeats):
        for one in timed.values():
            one.measure(request.device)
    found = []
    for (mode, name), one in timed.items():
        (both, speedup), (forward, forward_speedup) = (
            (statistics.median(taken), statistics.median(p / t for p, t in zip(plain, taken, strict=True)))
            for plain, taken in zip(timed[mode, PLAIN].seconds, one.seconds, strict=True)
        )
        emulated = "emulate" in one.backend
        sizes = (kind, rows, width, mode, name, one.backend)
        found.append(Row(*sizes, both, speedup, emulated, forward, forward_speedup))
    return found


def _prepared(name: str, layer: nn.Module, x: Tensor, grad: Tensor, mode: str, request: Request) -> _Timed:
    """Warmed up: compiled, tiles chosen, and asked what multiplies."""
    steps = _steps(layer, x, grad, compiled=mode == "compiled")
    fp8_products(reset=True)
    steps[0]()
    found = _Timed(_backend(name, layer, mode, request), steps)
    steps[0]()
    return found


def _inputs(kind: str, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output, in bfloat16, of unit variance."""
    side = next((n for n in _SIDES if rows % n**2 == 0), _SIDES[-1])
    shape = (rows, width) if kind == "linear" else (-(-rows // side**2), width, side, side)
    x, grad = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    if kind != "linear":
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return x.requires_grad_(), grad


def _plain(kind: str, width: int, request: Request) -> nn.Module:
    return nn.Linear(width, width, bias=False) if kind == "linear" else nn.Conv2d(width, width, **_kernel(kind))


def _ours(kind: str, width: int, request: Request) -> nn.Module:
    options: dict[str, Any] = {"fp8": True, "backend": request.backend}
    if kind == "linear":
        return MuSLinear(width, width, bias=False, **options)
    return MuSConv2d(width, width, **_kernel(kind), **options)


def _by_triton(kind: str, width: int, request: Request) -> nn.Module | None:
    """A 1x1 convolution by our kernel, where it serves the device: larger ones are computed by it in any case."""
    if kind != "1x1 conv" or _choice(kind, width, request, "triton") != "triton":
        return None
    layer: Any = _ours(kind, width, request)
    layer.pointwise = "triton"
    return layer


def _kernel(kind: str) -> dict[str, Any]:
    size = int(kind[0])
    return {"kernel_size": size, "padding": size // 2, "bias": False}


def _choice(kind: str, width: int, request: Request, pointwise: str = "scaled_mm") -> str:
    size = int(kind[0])
    options: dict[str, Any] = {"backend": request.backend, "pointwise": pointwise}
    return choose((width, width, size, size), (size // 2,) * 2, request.device, torch.bfloat16, **options).how


def _torchao(kind: str, width: int, request: Request) -> nn.Module | None:
    """torchao converts linear layers only."""
    if kind != "linear":
        return None
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        return None
    return convert_to_float8_training(nn.Sequential(_plain(kind, width, request)).to(torch.bfloat16))


_LAYERS: dict[str, Callable[[str, int, Request], nn.Module | None]] = {
    PLAIN: _plain,
    OURS: _ours,
    TRITON: _by_triton,
    TORCHAO: _torchao,
}


def _steps(layer: nn.Module, x: Tensor, grad: Tensor, compiled: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward pass, and the forward pass alone, which keeps what a backward pass would need."""
    layer = layer.to(device=x.device, dtype=torch.bfloat16)
    if x.dim() == 4:
        layer = layer.to(memory_format=torch.channels_last)
    call: Any = torch.compile(layer, dynamic=False) if compiled else layer

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        call(x).backward(grad)

    def forward() -> None:
        call(x)

    return step, forward


def _backend(name: str, layer: Any, mode: str, request: Request) -> str:
    """What really multiplied: counted where code is eager; compiled code keeps no count and takes what eager takes."""
    if name in (PLAIN, TORCHAO):
        return {PLAIN: "bfloat16", TORCHAO: "its own"}[name]
    if mode != "compiled":
        return ", ".join(sorted(fp8_products(reset=True)))
    if isinstance(layer, MuSConv2d):
        return _choice(f"{layer.kernel_size[0]}x", layer.weight.shape[0], request, layer.pointwise)
    return resolve_backend(request.backend, request.device, torch.bfloat16)


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


def bench_fp8_command(
    device: Annotated[str | None, text("cpu, cuda, ... (default: cuda where there is one)")] = None,
    widths: Annotated[str | None, text("inputs and outputs of the layers (default: by device)")] = None,
    rows: Annotated[str | None, text("of the products: images times pixels, or tokens")] = None,
    kinds: Annotated[str, text("of layers: linear, 1x1 conv, 3x3 conv")] = "linear,1x1 conv,3x3 conv",
    modes: Annotated[str, text("eager, compiled")] = "eager,compiled",
    repeats: Annotated[int, number(COUNT, "timed rounds; their median counts")] = 7,
    backend: Annotated[str | None, text("scaled_mm or emulate (default: the best)")] = None,
    output: Annotated[Path | None, path("also write JSON, which mus_fp8:auto reads")] = None,
) -> None:
    """From which sizes on FP8 layers are faster than bfloat16 here: linear layers and convolutions, interleaved."""
    if output is not None:
        check_file(output)
    request = parse(device or "", widths or "", rows or "", kinds, modes, repeats, backend)
    typer.echo(f"measuring on {describe(request.device)}", err=True)
    found = run(request, lambda work: track(list(work), "measuring"), lambda sentence: typer.echo(sentence, err=True))
    print_rows(found, request.device, request.repeats)
    if output is not None:
        write_table(found, request.device, output)
