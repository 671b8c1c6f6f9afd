"""What ``revnets deploy`` and ``revnets bench-deploy`` do, from names to files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..arguments import argument, excludes, needs, number, path, text, without_effect
from ..kernels.build import kernel_problem
from ..models.named import build_model, check_model
from ..profiling.command import track
from ..pruning import prune
from ..pruning.command import Source, calibration_batches, load_model
from ..pruning.one_shot import BLOCKED
from ..sparsity.masks import check_sparsity
from ..training.errors import refused
from ..training.files import write_json
from ..training.options.values import COUNT, POSITIVE, SEED, SHARE, THREADS, check_choice, check_once
from ..training.pictures import picture
from ..training.places import check_exists, check_folder
from .compare import COMPILED, EAGER, EXPLOITS, Measurement, compare, compare_layers, machine, speedups
from .engines import ENGINES, Deployed, check_limits, deploy, get_engine, load, open_folder
from .graph import ExportError
from .peers import check_engine
from .quantize import CALIBRATIONS, INT8_ENGINES, Quantized, accuracy, quantize


@dataclass(frozen=True)
class Request:
    """What is to be made; see ``revnets deploy --help``."""

    engine: str = "auto"
    batch_size: int | None = None
    int8: bool = False
    images: int = 256
    calibration: str = "minmax"
    eval_split: str = ""
    tolerance: float = 1e-3
    max_density: float | None = None


def run(source: Source, request: Request, with_data: bool) -> None:
    """Export, verify, say what was written and what its engine exploits.

    Args:
        source: the network; its output is a folder.
        request: what to make.
        with_data: whether the source's images are to be used.

    Raises:
        ValueError: one sentence, before long work where that can be.
    """
    _check(source, request, with_data)
    with _no_trace_of_failure(source.output):
        _make(source, request)


def _make(source: Source, request: Request) -> None:
    model, trained = load_model(source)
    model.eval()
    with refused(f"{source.model} cannot run", kind=ExportError):
        x = _example(model, source, trained, request.batch_size or 1)
        with torch.no_grad():
            model(x)
    options: dict[str, Any] = {
        "name": source.model.replace(":", "-").replace("/", "-"),
        "any_batch": request.batch_size is None,
    }
    if request.int8:
        batches = calibration_batches(source, model, trained, request.images)
        name = f"{options.pop('name')}-int8"
        engine = request.engine if request.engine != "auto" else "onnxruntime"
        small = quantize(
            model, batches, source.output, name, request.images, request.calibration, engine=engine, **options
        )
        _print_quantized(small, engine)
        path = small.path
    else:
        made = deploy(
            model,
            x,
            source.output,
            request.engine,
            tolerance=request.tolerance,
            max_density=request.max_density,
            **options,
        )
        _print_deployed(made)
        path, engine = made.path, made.engine
    if request.eval_split:
        _print_accuracy(source, request, model, trained, path, engine)


def _check(source: Source, request: Request, with_data: bool) -> None:
    """What can be refused at once.

    Raises:
        ValueError: for it.
    """
    if request.engine != "auto":
        get_engine(request.engine)
    if (request.int8 or request.eval_split) and not with_data:
        raise ExportError("--int8 and --eval-split need images: give --data, a folder or .tar file of class folders")
    if request.int8 and request.engine not in ("auto", *INT8_ENGINES):
        raise ExportError(
            f"engine {request.engine!r} runs no INT8: expected one of {', '.join(INT8_ENGINES)} with --int8"
        )
    check_choice("calibration", request.calibration, CALIBRATIONS)
    check_limits(request.tolerance, request.max_density)
    COUNT.check("images", request.images)
    if request.batch_size is not None:
        COUNT.check("batch_size", request.batch_size)
    check_folder(source.output)
    if with_data:
        check_exists(source.data, "folder or .tar file", "--data")
        for option, split, used in (
            ("--split", source.split, request.int8),
            ("--eval-split", request.eval_split, True),
        ):
            if used and split and not os.path.exists(source.data / split):
                raise ExportError(
                    f"{option}: there is no {split!r} in {str(source.data)!r}: give a folder or .tar file"
                )


@contextmanager
def _no_trace_of_failure(folder: Path) -> Iterator[None]:
    """Takes away the empty folders that were made on the way to an error."""
    missing = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def _example(model: nn.Module, source: Source, trained: Any, batch_size: int) -> Tensor:
    """Random numbers of the size that the model takes."""
    from timm.data import resolve_data_config

    known = ("img_size", "input_size", "in_chans")
    size = resolve_data_config({name: trained.get(name) for name in known}, model=model)["input_size"]
    return torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(source.seed))


def _print_deployed(made: Deployed) -> None:
    from rich.table import Table

    if made.seconds:
        table = Table(title=f"Engines at this input ({machine()})")
        for column in ("engine", "ms, median", "zeros that it exploits"):
            table.add_column(column, justify="right" if "ms" in column else "left")
        for name, seconds in sorted(made.seconds.items(), key=lambda item: item[1]):
            table.add_row(name, f"{1e3 * seconds:.2f}", ENGINES[name].exploits)
        _say(table)
    problem = kernel_problem()
    if problem is not None:
        _say(f"engine sparse runs on torch's dense kernels here: {problem}")
    for choice, count in Counter(layer.choice for layer in made.layers).items():
        chosen = [layer for layer in made.layers if layer.choice == choice]
        weights = sum(torch.Size(layer.shape).numel() for layer in chosen)
        share = sum(torch.Size(layer.shape).numel() * layer.density for layer in chosen) / weights
        _say(f"{choice}: {count} layers, {weights / 1e6:.2f} M weights, {100 * (1 - share):.0f}% of them zero")
    size = sum(file.stat().st_size for file in made.path.parent.glob(f"{made.path.stem}.*") if file.suffix != ".json")
    _say(
        f"wrote {made.path} for {made.engine} ({size / 1e6:.2f} MB; exploits {ENGINES[made.engine].exploits}); "
        f"outputs differ by at most {made.error:.1e} of the largest"
    )


def _print_quantized(small: Quantized, engine: str) -> None:
    agreement = "" if small.agreement is None else f", the same class for {100 * small.agreement:.1f}%"
    runs = "sparse" if engine == "sparse" else "onnxruntime and openvino"
    _say(
        f"wrote {small.path} for {runs} ({small.path.stat().st_size / 1e6:.2f} MB): "
        f"{small.weights / 1e6:.2f} M INT8 weights, {100 * small.zeros / max(small.weights, 1):.0f}% of them zero; on "
        f"calibration images outputs differ by {100 * small.error:.1f}% (root mean square){agreement}"
    )


def _print_accuracy(source: Source, request: Request, model: nn.Module, trained: Any, path: Path, engine: str) -> None:
    from rich.table import Table

    table = Table(title=f"Top-1 on {request.eval_split} of {source.data}")
    table.add_column("network")
    table.add_column("%", justify="right")

    def plain(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [model(x)]

    opened = load(path, None if engine == "sparse" else engine)
    for name, runner in (("torch, float32", plain), (f"{path.name}, {engine}", opened)):
        table.add_row(name, f"{accuracy(runner, _validation(source, request, model, trained)):.2f}")
    _say(table)


def _validation(source: Source, request: Request, model: nn.Module, trained: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """All images and labels of the split, in batches as the file takes them."""
    chosen = replace(source, split=request.eval_split, batch_size=request.batch_size or source.batch_size)
    for images, labels in calibration_batches(chosen, model, trained, 1 << 62):
        if request.batch_size is None or len(images) == request.batch_size:
            yield images, labels


# --- bench-deploy ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchRequest:
    """What is to be measured; see ``revnets bench-deploy --help``."""

    models: Sequence[str]
    sparsities: Sequence[float]
    threads: Sequence[int]
    engines: Sequence[str] = ()
    batch_size: int = 1
    img_size: int | None = None
    repeats: int = 25
    layers: bool = True
    output: Path | None = None
    pattern: str | None = None


def bench(request: BenchRequest) -> None:
    """Time engines and layers in one run, print tables, write JSON and a picture.

    Raises:
        ValueError: one sentence, before long work where that can be.
    """
    for sparsity in request.sparsities:
        check_sparsity(sparsity)
    if request.pattern is not None:
        check_choice("pattern", request.pattern, [BLOCKED])
    for engine in request.engines:
        if engine not in (EAGER, COMPILED):
            check_engine(engine)
    check_once("models", request.models)
    for name in request.models:
        check_model(name)
    for count in request.threads:
        THREADS.check("threads", count)
    if not (request.models and request.sparsities and request.threads):
        raise ExportError("there is nothing to measure: give a model, a sparsity and a number of threads at least")
    if request.output is not None:
        check_folder(request.output)
    found: list[Measurement] = []
    for name in request.models:
        networks, x = _networks(name, request)
        found += compare(networks, x, request.engines, request.threads, request.repeats, name, partial(_track, name))
    layers: list[Measurement] = []
    if request.layers and kernel_problem() is None:
        pruned = [s for s in request.sparsities if s]
        repeats = request.repeats
        layers = compare_layers(pruned, threads=request.threads, repeats=repeats, progress=partial(_track, "layers"))
    for title, rows in (("Whole networks", found), ("1x1 convolutions, float32", layers)):
        if rows:
            print_measurements(title, rows)
    if request.output is not None:
        folder = open_folder(request.output)
        _say("wrote " + ", ".join(str(path) for path in _save(folder, found, layers)))


def _track(what: str, work: Iterable[Any]) -> Iterable[Any]:
    return track(list(work), what)


def _networks(name: str, request: BenchRequest) -> tuple[dict[float, nn.Module], Tensor]:
    """The network with random weights, pruned by magnitude: time does not depend on their values."""
    import timm

    torch.manual_seed(0)
    model = build_model(name).eval()
    channels, *published = timm.get_pretrained_cfg(name).input_size
    sides = [request.img_size] * 2 if request.img_size else published
    with refused(f"{name} @{sides[0]} batch {request.batch_size} cannot run", kind=ExportError):
        x = torch.randn(request.batch_size, channels, *sides)
        with torch.no_grad():
            model(x)  # what it refuses is known before it is pruned and exported
    pruned = {
        s: prune(model, x, s, request.pattern, "magnitude", recalibrate=False, images=len(x)).model.eval()
        if s
        else model
        for s in request.sparsities
    }
    return pruned, x


def print_measurements(title: str, found: Sequence[Measurement]) -> None:
    """A table of measurements, each with how many times as fast it is as the fastest dense engine of its case: of the
    same class of accuracy (float32, or INT8 and bfloat16), and of all."""
    from rich.table import Table

    table = Table(title=f"{title}, medians of interleaved calls ({machine()})")
    words = ("case", "engine", "zeros that it exploits")
    ratios_of = ("x dense", "CPU ms", "x dense (CPU)", "x all dense")
    for column in ("case", "sparsity", "threads", "engine", "precision", "ms", *ratios_of, words[-1]):
        table.add_column(column, justify="left" if column in words else "right")
    ratios = zip(speedups(found), speedups(found, cpu=True), speedups(found, any_precision=True), strict=True)
    for (m, wall), (_, cpu), (_, of_all) in ratios:
        numbers = (f"{1e3 * m.seconds:.3f}", f"{wall:.2f}", f"{1e3 * m.cpu_seconds:.3f}", f"{cpu:.2f}", f"{of_all:.2f}")
        exploits = EXPLOITS.get(m.engine, "none")
        table.add_row(m.case, f"{m.sparsity:g}", str(m.threads), m.engine, m.precision, *numbers, exploits)
    _say(table)


def _save(folder: Path, found: Sequence[Measurement], layers: Sequence[Measurement]) -> list[Path]:
    data = {"machine": machine(), "networks": _records(found), "layers": _records(layers)}
    path, drawn = write_json(folder / "deploy.json", data), _draw(folder, found) if found else None
    return [path, drawn] if drawn else [path]


def _records(found: Sequence[Measurement]) -> list[dict[str, Any]]:
    both = zip(speedups(found), speedups(found, any_precision=True), strict=True)
    return [{**asdict(m), "times_dense": ratio, "times_all_dense": of_all} for (m, ratio), (_, of_all) in both]


def _draw(folder: Path, found: Sequence[Measurement]) -> Path | None:
    """Time over sparsity, a panel per network and number of threads; nothing without matplotlib."""
    panels = list(dict.fromkeys((m.case, m.threads) for m in found))

    def paint(figure: Any) -> None:
        for axes, (case, threads) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            here = [m for m in found if (m.case, m.threads) == (case, threads)]
            for engine in dict.fromkeys(m.engine for m in here):
                points = sorted((m.sparsity, 1e3 * m.seconds) for m in here if m.engine == engine)
                axes.plot(*zip(*points, strict=True), "o-", label=engine)
            axes.set(title=f"{case}, {threads} threads", xlabel="sparsity", ylabel="ms per call, median")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")

    return picture(folder / "deploy.png", (5 * len(panels), 4), paint, dpi=150)


def _say(what: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    if isinstance(what, Table):
        Console(width=170).print(what)
    else:
        Console(soft_wrap=True, highlight=False).print(what, markup=False)


@needs("data", "int8", "eval_split")
@needs("split", "int8")
@needs("images", "int8")
@needs("calibration", "int8")
@excludes("tolerance", "int8")
@excludes("max_density", "int8")
@without_effect("max_density", "with --engine {engine}: choose sparse", lambda v: v["engine"] not in ("sparse", "auto"))
def deploy_command(
    model: Annotated[str, argument("any timm model", "MODEL")],
    output: Annotated[Path, path("folder for the file")],
    checkpoint: Annotated[Path | None, path("trained weights, such as pruned ones; else the published ones")] = None,
    engine: Annotated[
        str, text("torch, onnxruntime, openvino, sparse, or auto: the fastest of those installed")
    ] = "auto",
    int8: Annotated[bool, typer.Option(help="INT8 weights and activations, calibrated on --data")] = False,
    data: Annotated[Path | None, path("folder or .tar file of images in class folders")] = None,
    split: Annotated[str, text("folder or .tar file inside --data to calibrate on")] = "train",
    images: Annotated[int, number(COUNT, "to calibrate on")] = 256,
    calibration: Annotated[str, text("of INT8 activations: minmax, entropy, percentile")] = "minmax",
    eval_split: Annotated[str | None, text("also measure top-1 on this one, such as validation")] = None,
    img_size: Annotated[int | None, number(COUNT, "default: that of the training, or the published")] = None,
    batch_size: Annotated[int | None, number(COUNT, "the only one that will be used (default: any)")] = None,
    model_kwargs: Annotated[list[str] | None, text("KEY=VALUE for timm.create_model")] = None,
    tolerance: Annotated[float, number(POSITIVE, "largest difference of outputs, relative to the largest")] = 1e-3,
    max_density: Annotated[
        float | None, number(SHARE, "of layers that engine sparse takes (default: those that are faster, measured)")
    ] = None,
    seed: Annotated[int, number(SEED, "which images are drawn")] = 0,
) -> None:
    """Write a trained network as a file for a fast engine, zeros exploited where that pays; verified against torch."""
    kwargs = tuple(model_kwargs or ())
    source = Source(model, data or Path(), output, checkpoint, split, img_size, kwargs, seed=seed)
    checks = (eval_split or "", tolerance, max_density)
    request = Request(engine, batch_size, int8, images, calibration, *checks)
    run(source, request, with_data=data is not None)
