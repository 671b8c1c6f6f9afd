"""The engines that a deployed network runs on: what each writes, how its file is opened, which zeros it exploits."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..kernels.build import kernel_problem
from ..training.errors import refused
from ..training.files import put_in_place
from ..training.options.values import COUNT
from ..training.places import make_folder
from .candidates import FLOAT32, Candidate, Deployed, Precisions, Progress, attempt, fastest, plainly, timed
from .graph import (
    INPUT_NAME,
    OUTPUT_NAME,
    ExportError,
    check_limits,
    export_graph,
    export_program,
    flat,
    worst_error,
)
from .lower import Layer, lower
from .runners import Runner, first_call, open_onnxruntime, open_openvino, open_torch
from .seal import Content, Purpose, Untrusted, read, refusal, seal


@dataclass(frozen=True)
class Engine:
    """Something that runs exported networks.

    Attributes:
        name: as ``--engine`` spells it.
        exploits: which zeros make it faster, in words.
        packages: that have to be installed.
        suffix: of its file; empty where it writes none.
        write: the graph to a path with that suffix.
        open: a file's content, and the number of threads (None: torch's own), as a function of images.
    """

    name: str
    exploits: str
    packages: tuple[str, ...]
    suffix: str
    write: Callable[[fx.GraphModule, Tensor, bool, Path], None]
    open: Callable[[Content, int | None], Runner]

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def check(self) -> None:
        """Make sure that it can be used.

        Raises:
            ExportError: where packages are missing.
        """
        missing = self.missing()
        if missing:
            raise ExportError(
                f"engine {self.name}: {', '.join(missing)} not installed: pip install 'revnets[deploy]', or choose "
                f"one of {', '.join(e.name for e in ENGINES.values() if not e.missing())}"
            )


def get_engine(name: str) -> Engine:
    """The engine of that name, installed.

    Raises:
        ExportError: for an unknown name, or one whose packages are missing.
    """
    if name not in ENGINES:
        raise ExportError(f"unknown engine {name!r}: expected auto or one of {', '.join(ENGINES)}")
    ENGINES[name].check()
    return ENGINES[name]


# --- torch -----------------------------------------------------------------------------------------------------------


def write_torch(graph: fx.GraphModule, x: Tensor, any_batch: bool, path: Path) -> None:
    """The graph as a program of ``torch.export``."""
    program = export_program(graph, x, any_batch)
    with refused("torch.export cannot write the model", kind=ExportError):
        torch.export.save(program, path)


# --- ONNX ------------------------------------------------------------------------------------------------------------


def write_onnx(graph: fx.GraphModule, x: Tensor, any_batch: bool, path: Path) -> None:
    """The graph as one .onnx file with an input ``image`` and outputs ``output``, ..."""
    program = export_program(graph, x, any_batch)
    outputs = len(flat(graph(x)))
    names = [OUTPUT_NAME] if outputs == 1 else [f"{OUTPUT_NAME}{i}" for i in range(outputs)]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), refused("torch.onnx refuses the model", kind=ExportError):
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            exported: Any = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT_NAME], output_names=names, verbose=False
            )
            exported.save(str(path), external_data=False)
    finally:
        logger.setLevel(level)


def _write_openvino(graph: fx.GraphModule, x: Tensor, any_batch: bool, path: Path) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        write_onnx(graph, x, any_batch, onnx)
        with refused("OpenVINO cannot convert the model", kind=ExportError):
            openvino.save_model(openvino.convert_model(str(onnx)), str(path), compress_to_fp16=False)


# --- ours ------------------------------------------------------------------------------------------------------------


def _write_sparse(graph: fx.GraphModule, x: Tensor, any_batch: bool, path: Path) -> None:
    write_torch(graph, x, any_batch, path)  # swapped before, see deploy


ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("torch", "none: zeros are multiplied", (), ".pt2", write_torch, open_torch),
        Engine(
            "onnxruntime",
            "none in float32",
            ("onnx", "onnxscript", "onnxruntime"),
            ".onnx",
            write_onnx,
            open_onnxruntime,
        ),
        Engine(
            "openvino",
            "none in float32 convolutions",
            ("onnx", "onnxscript", "openvino"),
            ".xml",
            _write_openvino,
            open_openvino,
        ),
        Engine("sparse", "any zeros of convolutions and linear layers", (), ".pt2", _write_sparse, open_torch),
    )
}
"""All that there are, by name; ``engine.missing()`` says why one cannot run here."""


def deploy(
    model: nn.Module,
    x: Tensor,
    folder: str | Path,
    engine: str = "auto",
    name: str = "model",
    any_batch: bool = True,
    tolerance: float = 1e-3,
    max_density: float | None = None,
    repeats: int = 11,
    precisions: Precisions | None = None,
    progress: Progress = plainly,
) -> Deployed:
    """Export a model for an engine into a folder, and verify the file against the model.

    Where engines are compared, a file of the engine ``sparse`` is only taken when no dense one that may be taken is
    as fast.

    Args:
        model: in float32, on the CPU; pruned ones keep their zeros.
        x: an example of the input, ``(N, C, H, W)``; engines are compared, and layers chosen, on it.
        folder: made if it is missing. What is in it stays until the new file is verified.
        engine: of ``ENGINES``; ``"auto"``: the one that is fastest on ``x``, of those installed.
        name: of the file, without its suffix.
        any_batch: whether the file takes other batch sizes than that of ``x``.
        tolerance: largest difference, relative to the largest output, on ``x`` and on random numbers.
        max_density: for the engine ``sparse``, see ``lower``.
        repeats: timed runs per engine for ``"auto"``; where the two fastest are close, they are timed again for longer.
        precisions: for ``"auto"``, which others than float32 are tried, and what they may cost: ``Precisions`` of
            ``revnets.deploy``.
        progress: wraps the pieces of work, given what they are.

    Raises:
        ExportError: for numbers that cannot be, an unknown engine or one that is not installed, a model that cannot be
            exported, outputs that differ, a folder that cannot be written, precisions for one engine.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()).eval()
        >>> x = torch.randn(1, 3, 8, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = deploy(net, x, folder, engine="torch")
        ...     torch.allclose(load(made.path)(x)[0], net(x), atol=1e-6)
        True
    """
    check_limits(tolerance, max_density)
    COUNT.check("repeats", repeats)
    if precisions is not None and engine != "auto":
        raise ExportError(f"precisions: only with engine='auto', got engine={engine!r}: leave out one of the two")
    if not name or name != Path(name).name:
        raise ExportError(f"name={name!r}: expected the name of a file, without a folder")
    if not isinstance(x, Tensor) or not x.numel():
        raise ExportError(f"x={type(x).__name__}: expected a tensor of images (N, C, H, W)")
    folder = open_folder(Path(folder))
    chosen = [e for e in ENGINES.values() if not e.missing()] if engine == "auto" else [get_engine(engine)]
    graph = export_graph(model, x, any_batch)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".deploy-") as temporary:

        def try_in_float32(one: Engine) -> Candidate:
            path, layers = _write(one, graph, x, any_batch, max_density, Path(temporary) / one.name, name)
            run = open_own(one, path, None)
            near = verify(run, model, x, tolerance, one.name)
            return Candidate(one.name, FLOAT32, path, run, near, tuple(layers))

        made: list[Candidate] = []
        works: list[Callable[[], Candidate]] = [partial(try_in_float32, one) for one in chosen]
        if len(chosen) > 1:  # one that cannot run the network leaves it to the others
            works = [partial(attempt, w, one.name, FLOAT32) for w, one in zip(works, chosen, strict=True)]
        if precisions is not None:
            works += precisions.works(model, x, any_batch, Path(temporary), name, made)
        for work in progress(works, "writing files"):
            made.append(work())
        ready = [one for one in made if not one.refused]
        if not any(one.precision == FLOAT32 for one in ready):
            raise ExportError("; ".join(dict.fromkeys(one.refused for one in made if one.precision == FLOAT32)))
        if len(ready) > 1:
            timed(ready, x, repeats, progress)
        if precisions is not None:
            precisions.judge(model, ready, progress)
        best = fastest(ready, x, repeats)
        path: Any = best.path
        put_in_place(sorted(path.parent.iterdir(), key=lambda file: file == path), folder)  # what it refers to first
    seconds = {one.name: one.seconds for one in ready} if len(ready) > 1 else {}
    compared = tuple(made) if len(made) > 1 else ()
    return Deployed(best.engine, folder / path.name, best.error, seconds, best.layers, best.precision, compared)


def _write(
    engine: Engine,
    graph: fx.GraphModule,
    x: Tensor,
    any_batch: bool,
    max_density: float | None,
    folder: Path,
    name: str,
) -> tuple[Path, list[Layer]]:
    folder.mkdir()
    path = folder / f"{name}{engine.suffix}"
    layers: list[Layer] = []
    if engine.name == "sparse":
        graph, layers = sparse_graph(graph, x, max_density)
    engine.write(graph, x, any_batch, path)
    seal(path)
    return path, layers


def sparse_graph(graph: fx.GraphModule, x: Tensor, max_density: float | None) -> tuple[fx.GraphModule, list[Layer]]:
    """A copy of the graph that uses the kernel; without one, every layer stays dense."""
    import copy

    graph = copy.deepcopy(graph)
    if kernel_problem() is not None and max_density is None:
        max_density = 0.3  # nothing to measure here; where the file runs, there may be a compiler
    return graph, lower(graph, x, max_density)


@torch.no_grad()
def verify(run: Runner, model: nn.Module, x: Tensor, tolerance: float, what: str = "the file") -> float:
    """The largest difference of the outputs on ``x`` and on random numbers, relative to the largest output.

    Raises:
        ExportError: if it exceeds the tolerance, or there are no outputs, since the engine fails.
    """
    was_training = model.training
    model.eval()
    try:
        generator = torch.Generator().manual_seed(0)
        inputs = (x, torch.randn(x.shape, generator=generator))
        error = max(worst_error(first_call(run, one, what), model(one)) for one in inputs)
    finally:
        model.train(was_training)
    if not error <= tolerance:
        raise ExportError(
            f"{what}: outputs differ from the model's by {error:.1e} of the largest, more than the tolerance "
            f"{tolerance:.0e}: nothing was written"
        )
    return error


def load(path: str | Path, engine: str | None = None, threads: int | None = None, trust: bool = False) -> Runner:
    """A deployed file as a function of float32 images ``(N, C, H, W)`` that gives a list of outputs.

    Only what ``deploy`` or ``quantize`` wrote is opened, if it is as they wrote it (a SHA-256 at its end says so) and
    holds nothing that could run code or name other files. Other files, such as those of releases that wrote no
    SHA-256, need ``trust=True``: torch and the other engines may then run code that is in them.

    Args:
        path: ``.pt2``, ``.onnx`` or ``.xml``.
        engine: for ``.onnx`` files ``"onnxruntime"`` or ``"openvino"``; by default the one it was chosen for. Without
            ``trust`` one of those that run files of that name.
        threads: None: as many as torch uses.
        trust: open the file unchecked; only for files of people whose programs you would run, too.

    Returns:
        The function; it may be called from several threads at once.

    Raises:
        ExportError: for a file that is missing, or that the engine does not run or cannot open.
        Untrusted: an ``ExportError``, for one that needs ``trust=True``.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"there is no file {str(path)!r}: give one that revnets deploy wrote")
    if engine is None and path.suffix not in _BY_SUFFIX:
        raise ExportError(f"{str(path)!r}: expected a name that ends in {', '.join(_BY_SUFFIX)}")
    given = None if engine is None else get_engine(engine)
    able = _BY_SUFFIX.get(path.suffix)
    if given is not None and able is not None and given.name not in able and not trust:
        raise ExportError(f"engine={engine!r} does not run {str(path)!r}: expected {' or '.join(able)}")
    content = read(path, trust)
    if trust and content.purpose.engine not in ("", *(able or ())):
        content = replace(content, purpose=Purpose())  # a note that nothing can follow: as if there were none
    return (given or get_engine(_engine_of(content))).open(content, threads)


_BY_SUFFIX = {".pt2": ("torch", "sparse"), ".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",)}


def _engine_of(content: Content) -> str:
    """The engine that a file was chosen for, or what its suffix says.

    Raises:
        Untrusted: for one that runs no such file.
    """
    able, noted = _BY_SUFFIX[content.path.suffix], content.purpose.engine
    if noted and noted not in able:
        raise Untrusted(refusal(content.path, f"its note names {noted!r}, where {' or '.join(able)} runs such files"))
    return noted or able[0]


def open_own(engine: Engine, path: Path, threads: int | None) -> Runner:
    """A file that was just written, opened as ``load`` will; with a warning where that will need ``trust=True``."""
    try:
        return engine.open(read(path), threads)
    except Untrusted as error:
        warnings.warn(f"the file will need load(..., trust=True): {error}", stacklevel=2)
        return engine.open(read(path, trust=True), threads)


def open_folder(path: Path) -> Path:
    """The folder for a file, made if it is missing.

    Raises:
        ExportError: when it cannot be made or written to.
    """
    try:
        return make_folder(path)
    except ValueError as error:
        raise ExportError(str(error)) from error
