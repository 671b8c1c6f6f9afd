"""What ``revnets deploy`` and ``revnets bench-deploy`` do, from names to files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product, takewhile
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
from ..sparsity.blocks import BLOCKED
from ..sparsity.masks import check_sparsity
from ..training.data.splits import find_split, split_or_root
from ..training.errors import refused
from ..training.options.values import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, THREADS, check_choice, check_once
from ..training.places import check_exists, check_folder
from .bench_report import print_layer_times, print_measurements, save_measurements
from .by_layer import LayerTime, layer_times
from .candidates import least
from .compare import COMPILED, EAGER, Measurement, compare, compare_layers
from .engines import ENGINES, check_limits, deploy, get_engine, load, open_folder
from .graph import ExportError
from .peers import check_engine
from .precisions import Precisions
from .quantize import CALIBRATIONS, INT8_ENGINES, accuracies, quantize
from .report import print_accuracy, print_deployed, print_quantized, say


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
    accuracy_drop: float | None = None


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
    if _judged_on_its_calibration(source, request):
        say(
            f"warning: INT8 is calibrated on images of {str(source.data)!r} on which its top-1 is measured, too: that "
            "may be lower on others: give --split and --eval-split, or --data with the folders train and validation"
        )
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
        options |= {"engine": engine, "batch_size": request.batch_size or 1}
        small = quantize(model, batches, source.output, name, request.images, request.calibration, **options)
        print_quantized(small, engine)
        path = small.path
    else:
        options |= {"tolerance": request.tolerance, "max_density": request.max_density, "progress": track}
        if request.accuracy_drop is not None:
            options["precisions"] = _precisions(source, request, model, trained)
        made = deploy(model, x, source.output, request.engine, **options)
        print_deployed(made)
        path, engine = made.path, made.engine
    if engine == "sparse" and request.engine == "sparse":
        _compare_with_dense(path, model, x, source.output, request)
    if request.eval_split and request.accuracy_drop is None:
        _print_accuracy(source, request, model, trained, path, engine)


def _precisions(source: Source, request: Request, model: nn.Module, trained: Any) -> Precisions:
    """What accuracy may cost, and the images that say what it costs."""
    validation = _Validation(source, request, model, trained)
    calibration = calibration_batches(source, model, trained, request.images)
    drop = request.accuracy_drop or 0.0
    return Precisions(drop, calibration, validation, request.images, request.calibration)


def _compare_with_dense(path: Path, model: nn.Module, x: Tensor, folder: Path, request: Request) -> None:
    """Says how fast a file of the engine ``sparse``, which was asked for, is beside the dense ones in float32."""
    dense = [one for one in ENGINES.values() if one.name != "sparse" and not one.missing()]
    any_batch = request.batch_size is None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".deploy-") as temporary:
        files: dict[str, Path] = {}
        for one in track(dense, "comparing with dense engines"):
            folder = Path(temporary) / one.name
            with suppress(ExportError):  # the others are enough
                made = deploy(model, x, folder, one.name, any_batch=any_batch, tolerance=request.tolerance)
                files[one.name] = made.path
        if not files:
            return
        runs = [load(each) for each in (path, *files.values())]
        ours, *others = (1e3 * seconds for seconds in least(runs, x, 11))
    best = min(others)
    words = f"{ours:.2f} ms here, {list(files)[others.index(best)]} in float32 {best:.2f} ms"
    if ours < best:
        say(f"{words}: {best / ours:.2f} times as fast as the fastest dense engine in float32")
    else:
        say(f"warning: {words}: on this machine the sparse file is no faster; leave out --engine to get the fastest")


def _check(source: Source, request: Request, with_data: bool) -> None:
    """What can be refused at once.

    Raises:
        ValueError: for it.
    """
    if request.engine != "auto":
        get_engine(request.engine)
    if (request.int8 or request.eval_split or request.accuracy_drop is not None) and not with_data:
        raise ExportError(
            "--int8, --eval-split and --accuracy-drop need images: give --data, a folder or .tar file of class folders"
        )
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
            ("--split", source.split, request.int8 or request.accuracy_drop is not None),
            ("--eval-split", request.eval_split, True),
        ):
            if used and split:
                _check_split(option, source.data, split)


def _judged_on_its_calibration(source: Source, request: Request) -> bool:
    """Whether top-1 of INT8 is measured on the images that it is calibrated on."""
    if not request.eval_split or not (request.int8 or request.accuracy_drop is not None):
        return False
    own = find_split(source.data, source.split) if source.split else split_or_root(source.data, "train")
    own, other = own.resolve(), find_split(source.data, request.eval_split).resolve()
    return own == other or own in other.parents or other in own.parents


def _check_split(option: str, data: Path, split: str) -> None:
    try:
        find_split(data, split)
    except ValueError as error:
        raise ExportError(
            f"{option}: there is no {split!r} in {str(data)!r} ({error}): give a folder or .tar file"
        ) from error


def _splits(data: Path, split: str | None, eval_split: str | None) -> tuple[str, str]:
    """The splits to calibrate on and to measure accuracy on: of a folder of class folders alone, that one is both."""
    with suppress(ValueError):
        if split_or_root(data, "train") == data:
            return split or ".", eval_split or "."
    return split or "train", eval_split or "validation"


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


def _print_accuracy(source: Source, request: Request, model: nn.Module, trained: Any, path: Path, engine: str) -> None:
    def plain(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [model(x)]

    opened = load(path)
    images = track(_Validation(source, request, model, trained), "measuring top-1")
    found = accuracies([plain, opened], images)
    print_accuracy(f"{request.eval_split} of {source.data}", ["torch, float32", f"{path.name}, {engine}"], found)


class _Validation:
    """All images and labels of the split, in batches as the file takes them."""

    def __init__(self, source: Source, request: Request, model: nn.Module, trained: Any) -> None:
        self._size = request.batch_size
        chosen = replace(source, split=request.eval_split, batch_size=self._size or source.batch_size)
        self._batches = calibration_batches(chosen, model, trained, 1 << 62)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._batches:
            missing = 0 if self._size is None else self._size - len(images)
            again = images.repeat(-(-missing // len(images)), 1, 1, 1)[:missing]
            yield torch.cat((images, again)), labels  # the last batch is filled up, without labels


# --- bench-deploy ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchRequest:
    """What is to be measured; see ``revnets bench-deploy --help``."""

    models: Sequence[str]
    sparsities: Sequence[float]
    threads: Sequence[int]
    engines: Sequence[str] = ()
    batch_sizes: Sequence[int] = (1,)
    img_size: int | None = None
    repeats: int = 25
    layers: bool = True
    output: Path | None = None
    pattern: str | None = None
    by_layer: bool = False


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
    if request.by_layer:
        _check_by_layer(request.engines)
    check_once("models", request.models)
    for name in request.models:
        check_model(name)
    for count in request.threads:
        THREADS.check("threads", count)
    for size in request.batch_sizes:
        COUNT.check("batch_size", size)
    if not (request.models and request.sparsities and request.threads and request.batch_sizes):
        raise ExportError(
            "there is nothing to measure: give a model, a sparsity, a number of threads and a batch size at least"
        )
    if request.output is not None:
        check_folder(request.output)
    found: list[Measurement] = []
    parts: list[LayerTime] = []
    for name, size in product(request.models, request.batch_sizes):
        networks, x = _networks(name, size, request)
        shown = partial(_track, f"{name}, batch {size}")
        found += compare(networks, x, request.engines, request.threads, request.repeats, name, shown)
        for (share, model), count in product(networks.items() if request.by_layer else (), request.threads):
            case = (f"{name}, batch {size}", share)
            parts += layer_times(model, x, request.engines, count, request.repeats, *case)
    layers: list[Measurement] = []
    if request.layers and kernel_problem() is None:
        pruned = [s for s in request.sparsities if s]
        measured = partial(compare_layers, pruned, blocked=request.pattern is not None, repeats=request.repeats)
        layers = measured(threads=request.threads, progress=partial(_track, "layers"))
    for title, rows in (("Whole networks", found), ("1x1 convolutions", layers)):
        if rows:
            print_measurements(title, rows)
    print_layer_times(parts)
    if request.output is not None:
        folder = open_folder(request.output)
        say("wrote " + ", ".join(str(path) for path in save_measurements(folder, found, layers, parts)))


def _check_by_layer(engines: Sequence[str]) -> None:
    """Refuse to time layers of engines that do not tell what theirs take."""
    if engines and not {"sparse", "openvino"} & set(engines):
        raise ExportError(f"--by-layer: {', '.join(engines)} tell nothing of layers; give sparse, openvino or both")
    problem = kernel_problem()
    if problem is not None and (not engines or "sparse" in engines):
        raise ExportError(f"--by-layer: there is no kernel to time, {problem}; give --engines openvino")


def _track(what: str, work: Iterable[Any]) -> Iterable[Any]:
    return track(list(work), what)


def _networks(name: str, batch_size: int, request: BenchRequest) -> tuple[dict[float, nn.Module], Tensor]:
    """The network with random weights, pruned by magnitude: their values hardly matter for time (``byte_pairs``)."""
    import timm

    torch.manual_seed(0)
    model = build_model(name).eval()
    channels, *published = timm.get_pretrained_cfg(name).input_size
    sides = [request.img_size] * 2 if request.img_size else published
    with refused(f"{name} @{sides[0]} batch {batch_size} cannot run", kind=ExportError):
        x = torch.randn(batch_size, channels, *sides)
        with torch.no_grad():
            model(x)  # what it refuses is known before it is pruned and exported
    pruned = {
        s: prune(model, x, s, request.pattern, "magnitude", recalibrate=False, images=len(x)).model.eval()
        if s
        else model
        for s in request.sparsities
    }
    return pruned, x


@needs("data", "int8", "eval_split", "accuracy_drop")
@needs("split", "int8", "accuracy_drop")
@needs("images", "int8", "accuracy_drop")
@needs("calibration", "int8", "accuracy_drop")
@excludes("tolerance", "int8")
@excludes("max_density", "int8")
@excludes("accuracy_drop", "int8")
@without_effect("accuracy_drop", "with --engine {engine}: leave out --engine", lambda v: v["engine"] != "auto")
@without_effect("max_density", "with --engine {engine}: choose sparse", lambda v: v["engine"] not in ("sparse", "auto"))
def deploy_command(
    model: Annotated[str, argument("any timm model", "MODEL")],
    output: Annotated[Path, path("folder for the file")],
    checkpoint: Annotated[Path | None, path("trained weights, such as pruned ones; else the published ones")] = None,
    engine: Annotated[
        str, text("torch, onnxruntime, openvino, sparse, or auto: the fastest of those installed, measured here")
    ] = "auto",
    accuracy_drop: Annotated[
        float | None,
        number(NOT_NEGATIVE, "also INT8 and bfloat16, where they lose at most so many points of top-1 on --data"),
    ] = None,
    int8: Annotated[bool, typer.Option(help="INT8 weights and activations, calibrated on --data")] = False,
    data: Annotated[Path | None, path("folder or .tar file of images in class folders")] = None,
    split: Annotated[str | None, text("folder or .tar file inside --data to calibrate on (default: train)")] = None,
    images: Annotated[int, number(COUNT, "to calibrate on")] = 256,
    calibration: Annotated[str, text("of INT8 activations: minmax, entropy, percentile")] = "minmax",
    eval_split: Annotated[
        str | None, text("measure top-1 on this one (with --accuracy-drop by default: validation)")
    ] = None,
    img_size: Annotated[int | None, number(COUNT, "default: that of the training, or the published")] = None,
    batch_size: Annotated[int | None, number(COUNT, "the only one that will be used (default: any)")] = None,
    model_kwargs: Annotated[list[str] | None, text("KEY=VALUE for timm.create_model")] = None,
    tolerance: Annotated[float, number(POSITIVE, "largest difference of outputs, relative to the largest")] = 1e-3,
    max_density: Annotated[
        float | None, number(SHARE, "of layers that engine sparse takes (default: those that are faster, measured)")
    ] = None,
    seed: Annotated[int, number(SEED, "which images are drawn")] = 0,
) -> None:
    """Write a trained network for the engine that is fastest here, zeros exploited where that pays; verified."""
    kwargs = tuple(model_kwargs or ())
    train, validation = _splits(data, split, eval_split) if data is not None else (split or "", eval_split or "")
    if accuracy_drop is None:
        validation = eval_split or ""
    source = Source(model, data or Path(), output, checkpoint, train, img_size, kwargs, seed=seed)
    checks = (validation, tolerance, max_density, accuracy_drop)
    request = Request(engine, batch_size, int8, images, calibration, *checks)
    run(source, request, with_data=data is not None)
