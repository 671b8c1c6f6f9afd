"""Training steps of sparse layers and networks: dense, masked, and on the kernel that skips zeros."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from ..arguments import argument, needs, number, path, text
from ..deploy.compare import LAYERS, machine
from ..deploy.runners import torch_threads
from ..kernels.build import load_kernel
from ..layers import SparseConv2d, convert, use_sparse_kernel
from ..models.named import build_model, check_model
from ..profiling.command import track
from ..profiling.turns import medians
from ..sparsity.masks import check_sparsity
from ..training.errors import refused
from ..training.files import write_csv, write_json
from ..training.options.values import COUNT, SPARSITY, THREADS, check_once
from ..training.places import check_folder, make_folder

DENSE, MASKED, KERNEL = "dense", "masked", "kernel"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
WINDOWS = [  # input channels, output channels, side of the kernel, stride, side of the image: those of ResNet-50
    (64, 64, 3, 1, 56),
    (128, 128, 3, 1, 28),
    (256, 256, 3, 1, 14),
    (512, 512, 3, 1, 7),
    (128, 128, 3, 2, 56),
    (512, 512, 3, 2, 14),
    (256, 512, 1, 2, 56),
    (1024, 2048, 1, 2, 14),
]
Progress = Callable[[Iterable[Any]], Iterable[Any]]
_WARM_SECONDS = 0.03
FILES = ("sparse_training.csv", "sparse_training.json")
"""What ``save`` writes."""


@dataclass(frozen=True)
class Request:
    """What is to be measured; see ``revnets bench-sparse-training --help``.

    Raises:
        ValueError: for sparsities or numbers of threads that cannot be.
    """

    models: Sequence[str]
    sparsities: Sequence[float]
    threads: Sequence[int]
    batch_size: int = 8
    img_size: int = 224
    repeats: int = 15
    layers: bool = True

    def __post_init__(self) -> None:
        check_once("models", self.models)
        for name in self.models:
            check_model(name)
        if not (self.models or self.layers):
            raise ValueError("there is nothing to measure without layers and without a model: name one, or keep layers")
        if not (self.sparsities and self.threads):
            raise ValueError("there is nothing to measure without a sparsity and a number of threads: give one of each")
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        for count in self.threads:
            THREADS.check("threads", count)
        for name in ("batch_size", "img_size", "repeats"):
            COUNT.check(name, getattr(self, name))


@dataclass(frozen=True)
class Row:
    """One way to train one case: median seconds of a step, all ways by turns.

    Attributes:
        case: layer or network.
        sparsity: share of zeros of the masks; the dense way is measured beside each.
        threads: of torch and of the kernel.
        way: ``dense`` (plain layers), ``masked`` (weights times masks), ``kernel`` (where it was measured to pay).
        layout: ``contiguous`` or ``channels last``.
        seconds: of forward pass, backward pass and, of networks, the optimizer's step; wall time.
        cpu_seconds: the processor's time for it, which other programs disturb less.
    """

    case: str
    sparsity: float
    threads: int
    way: str
    layout: str
    seconds: float
    cpu_seconds: float


def run(request: Request, progress: Progress = iter) -> tuple[list[Row], list[Row]]:
    """Measure layers and networks.

    Args:
        request: what to measure.
        progress: wraps the list of cases, e.g. ``rich.progress.track``.

    Returns:
        Rows of the layers, rows of the networks.

    Raises:
        ValueError: for an unknown network, or one without layers for the kernel.
        KernelUnavailable: without a compiler.
    """
    load_kernel()
    makers: list[tuple[bool, str, Callable[[float], dict[str, nn.Module]], tuple[int, ...]]] = []
    if request.layers:
        for inputs, outputs, kernel, stride, side in (*((i, o, 1, 1, side) for i, o, side in LAYERS), *WINDOWS):
            shape = (request.batch_size, inputs, side, side)
            kind = "" if kernel == stride == 1 else f", {kernel}x{kernel}, stride {stride}"
            make = partial(_layer, inputs, outputs, kernel, stride)
            makers.append((False, f"{inputs} -> {outputs} @ {side}x{side}{kind}", make, shape))
    for name in request.models:
        size = (request.batch_size, 3, request.img_size, request.img_size)
        makers.append((True, f"{name} @ {request.img_size}", partial(_network, name, size[1:]), size))
    found: tuple[list[Row], list[Row]] = ([], [])
    cases = list(itertools.product(request.threads, request.sparsities, makers))
    for threads, sparsity, (whole, case, make, shape) in progress(cases):
        with torch_threads(threads), refused(f"{case} cannot be measured", kind=ValueError):
            seconds = _measure(make(sparsity), shape, whole, request.repeats)
        found[whole].extend(Row(case, sparsity, threads, *key, *each) for key, each in seconds.items())
    return found


def _layer(inputs: int, outputs: int, side: int, stride: int, sparsity: float) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    numbers: dict[str, Any] = {"kernel_size": side, "stride": stride, "padding": side // 2, "bias": False}
    masked = SparseConv2d(inputs, outputs, **numbers, sparsity=sparsity)
    kernel = copy.deepcopy(masked)
    use_sparse_kernel(kernel)
    return {DENSE: nn.Conv2d(inputs, outputs, **numbers), MASKED: masked, KERNEL: kernel}


def _network(name: str, input_size: tuple[int, int, int], sparsity: float) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = build_model(name).train()
    masked = convert(copy.deepcopy(dense), f"sparse:{sparsity}", input_size=input_size).model
    kernel = copy.deepcopy(masked)
    if not use_sparse_kernel(kernel):
        raise ValueError(
            f"{name} has no layers that can be sparse and that the kernel has a loop for: nothing to measure"
        )
    return {DENSE: dense, MASKED: masked, KERNEL: kernel}


def _measure(
    models: dict[str, nn.Module], shape: tuple[int, ...], whole: bool, repeats: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Median seconds, of wall and processor, by way and layout."""
    x, make = torch.randn(shape), _network_step if whole else _layer_step
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    for (way, model), (name, layout) in itertools.product(models.items(), LAYOUTS.items()):
        placed: Any = copy.deepcopy(model)
        placed.to(memory_format=layout)
        steps[way, name] = make(placed, x.to(memory_format=layout))
    return dict(zip(steps, medians(list(steps.values()), repeats, _WARM_SECONDS), strict=True))


def _layer_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    grad = torch.randn_like(layer(x))

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(grad)

    return step


def _network_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def best(rows: Sequence[Row], cpu: bool = False) -> dict[tuple[str, float, int], dict[str, float]]:
    """Seconds by case, sparsity and threads, then by way, each in its faster layout.

    Args:
        rows: measured.
        cpu: the processor's time instead of wall time.

    Example:
        >>> def row(way, layout, seconds):
        ...     return Row("a", 0.9, 1, way, layout, seconds, seconds)
        >>> rows = [row("dense", "contiguous", 3.0), row("dense", "channels last", 2.0)]
        >>> best([*rows, row("kernel", "contiguous", 0.5)])
        {('a', 0.9, 1): {'dense': 2.0, 'kernel': 0.5}}
    """
    found: dict[tuple[str, float, int], dict[str, float]] = {}
    for row in rows:
        ways = found.setdefault((row.case, row.sparsity, row.threads), {})
        seconds = row.cpu_seconds if cpu else row.seconds
        ways[row.way] = min(ways.get(row.way, seconds), seconds)
    return found


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """A line per case: milliseconds of every way in its faster layout, and the others' ratios to the kernel."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: ms per step, medians by turns, each way in its faster layout ({machine()})")
    ratios = ("x dense", "x masked", "x dense (CPU)", "x masked (CPU)")
    for column in ("case", "sparsity", "threads", DENSE, MASKED, KERNEL, *ratios):
        table.add_column(column, justify="left" if column == "case" else "right")
    of_cpu = best(rows, cpu=True)
    for (case, sparsity, threads), wall in best(rows).items():
        times = [f"{1e3 * wall[way]:.2f}" for way in (DENSE, MASKED, KERNEL)]
        both = (wall, of_cpu[case, sparsity, threads])
        faster = [f"{seconds[way] / seconds[KERNEL]:.2f}" for seconds in both for way in (DENSE, MASKED)]
        table.add_row(case, f"{sparsity:g}", str(threads), *times, *faster)
    Console(width=170).print(table)


def save(layers: Sequence[Row], networks: Sequence[Row], folder: Path) -> list[Path]:
    """All rows as CSV and JSON, complete or not at all, in a folder that is made if it is missing."""
    make_folder(folder)
    data = {"machine": machine(), "layers": [asdict(r) for r in layers], "networks": [asdict(r) for r in networks]}
    columns = [field.name for field in fields(Row)]
    table, records = FILES
    return [
        write_csv(folder / table, (asdict(row) for row in (*layers, *networks)), columns),
        write_json(folder / records, data),
    ]


@needs("img_size", "models")
def bench_sparse_training_command(
    models: Annotated[list[str] | None, argument("any timm models; random weights", "MODEL")] = None,
    sparsity: Annotated[str, text("of the masks, separated by commas")] = "0.7,0.8,0.9",
    threads: Annotated[str, text("numbers of threads, separated by commas")] = "1",
    img_size: Annotated[int, number(COUNT, "of the networks' images")] = 224,
    batch_size: Annotated[int, number(COUNT, "images per step")] = 8,
    repeats: Annotated[int, number(COUNT, "timed steps per case; their median counts")] = 15,
    layers: Annotated[bool, typer.Option(help="single convolutions as well")] = True,
    output: Annotated[Path | None, path("folder for CSV and JSON")] = None,
) -> None:
    """Training steps on the CPU, dense, masked and on the kernel that skips zeros: interleaved, medians."""
    shares = SPARSITY.read_list("--sparsity", sparsity)
    counts = THREADS.read_list("--threads", threads)
    request = Request(models or (), shares, counts, batch_size, img_size, repeats, layers)
    if output is not None:
        check_folder(output, FILES)
    of_layers, of_networks = run(request, lambda work: track(list(work), "measuring"))
    for title, rows in (("Convolutions", of_layers), ("Whole networks", of_networks)):
        if rows:
            print_rows(title, rows)
    if output is not None:
        for file in save(of_layers, of_networks, output):
            typer.echo(f"wrote {file}")
