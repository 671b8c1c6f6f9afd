"""Engines side by side: whole networks and single layers, dense and pruned, in one interleaved run."""

from __future__ import annotations

import copy
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.build import Geometry, kernel_problem, kernel_target, load_kernel
from ..kernels.byte_blocks import compress_bytes, to_blocks
from ..kernels.byte_calls import ByteConvCall, Finish
from ..kernels.calls import ConvCall
from ..kernels.compressed import compress
from ..profiling.turns import medians
from ..pruning.solve import Blocks, solve
from .candidates import FLOAT32, INT8
from .engines import ENGINES, sparse_graph, verify
from .graph import export_graph, flat
from .peers import PEERS, check_engine, instructions, kernels_of
from .runners import Runner, module_runner, torch_threads
from .seal import read

Progress = Callable[[Iterable[Any]], Iterable[Any]]
EAGER, COMPILED = "torch eager", "torch compiled"
_OURS = ("sparse", "sparse int8")
EXPLOITS = {
    EAGER: "none",
    COMPILED: "none",
    **{name: engine.exploits for name, engine in ENGINES.items()},
    **dict.fromkeys(PEERS, "none"),
    "sparse int8": "blocks of four input channels",
}

_WARM_SECONDS = 0.06
LAYERS = [  # input channels, output channels, side of the image: those of MobileNets and ResNet-50
    (32, 64, 112),
    (64, 128, 56),
    (128, 256, 28),
    (256, 512, 14),
    (512, 512, 14),
    (1024, 1024, 7),
    (64, 256, 56),
    (256, 1024, 14),
    (2048, 512, 7),
]


@dataclass(frozen=True)
class Measurement:
    """What one case took.

    Attributes:
        case: network or layer, with its sparsity.
        sparsity: share of zeros in what was pruned.
        engine: that ran it.
        threads: of the engine.
        seconds: median of the wall time.
        cpu_seconds: median of the processor's time, which other programs disturb less.
        error: relative to the model's outputs: the largest; of other precisions than float32 the root mean square.
        precision: that it computed in.
        batch_size: images of a call.
        kernels: that ran its layers, with their instructions, as far as the engine tells.
    """

    case: str
    sparsity: float
    engine: str
    threads: int
    seconds: float
    cpu_seconds: float
    error: float = 0.0
    precision: str = FLOAT32
    batch_size: int = 1
    kernels: str = ""


def compare(
    networks: Mapping[float, nn.Module],
    x: Tensor,
    engines: Sequence[str] = (),
    threads: Sequence[int] = (1,),
    repeats: int = 25,
    name: str = "",
    progress: Progress = iter,
    tolerance: float = 1e-3,
) -> list[Measurement]:
    """Time the same network at several sparsities on several engines, all by turns, medians.

    Args:
        networks: by the share of zeros of their pruned layers; 0 is the dense one.
        x: the images of one call.
        engines: names of ``ENGINES`` (in float32), of ``PEERS`` (in INT8, or what the engine takes by default),
            ``"torch eager"``, ``"torch compiled"`` (which takes minutes); none for all that are installed. Compiled and
            at other precisions, engines that skip no zeros run the first network alone.
        threads: numbers of threads, each a round of its own.
        repeats: timed calls per case.
        name: of the network.
        progress: wraps the list of pieces of work, e.g. ``rich.progress.track``.
        tolerance: see ``revnets.deploy.deploy``.

    Raises:
        ExportError: for an engine that is unknown or not installed, outputs that differ.
    """
    installed = [e.name for e in ENGINES.values() if not e.missing()]
    installed += [peer.name for peer in PEERS.values() if not peer.missing()]
    names = list(engines) or [EAGER, COMPILED, *installed]
    for engine in names:
        if engine not in (EAGER, COMPILED):
            check_engine(engine)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(Path(folder), x)
        for number in threads:
            cases: dict[tuple[float, str], Runner] = {}
            errors: dict[tuple[float, str], float] = {}
            for sparsity, engine in progress(list(itertools.product(networks, names))):
                dense = engine == COMPILED or (engine in PEERS and engine not in _OURS)
                if dense and sparsity != min(networks):
                    continue
                run = files.runner(networks[sparsity], sparsity, engine, number)
                model = networks[sparsity]
                near = _error(run, model, x) if engine in PEERS else verify(run, model, x, tolerance, engine)
                errors[sparsity, engine] = near
                cases[sparsity, engine] = run
            with torch.no_grad():
                times = medians([partial(run, x) for run in cases.values()], repeats, _WARM_SECONDS, progress)
            for (sparsity, engine), (wall, cpu) in zip(cases, times, strict=True):
                used = PEERS[engine].used() if engine in PEERS else FLOAT32
                kernels = kernels_of(engine, cases[sparsity, engine])
                more = (errors[sparsity, engine], used, len(x), kernels)
                found.append(Measurement(name, sparsity, engine, number, wall, cpu, *more))
    return found


@torch.no_grad()
def _error(run: Runner, model: nn.Module, x: Tensor) -> float:
    """Root mean square of the difference, relative to the model's outputs."""
    outputs, wanted = run(x), flat(model.eval()(x))
    off = sum(float((a - b).double().square().sum()) for a, b in zip(outputs, wanted, strict=True))
    return (off / max(sum(float(b.double().square().sum()) for b in wanted), 1e-12)) ** 0.5


class _Files:
    """Exported files of a comparison, each written once."""

    def __init__(self, folder: Path, x: Tensor) -> None:
        self._folder, self._x = folder, x
        self._graphs: dict[float, Any] = {}

    def runner(self, model: nn.Module, sparsity: float, engine: str, threads: int) -> Runner:
        if engine == EAGER:
            return _eager(model, self._x, threads)
        if sparsity not in self._graphs:
            self._graphs[sparsity] = export_graph(model, self._x, any_batch=False)
        graph = self._graphs[sparsity]
        if engine == COMPILED:
            return _compiled(graph, self._x, threads)
        if engine in PEERS:
            return PEERS[engine].open(graph, self._x, self._folder, str(sparsity), threads)
        one = ENGINES[engine]
        path = self._folder / f"{engine}-{sparsity}-{threads if engine == 'sparse' else ''}{one.suffix}"
        if not path.exists():
            if engine == "sparse":  # layers are chosen by measuring: for each number of threads
                with torch_threads(threads):
                    graph, _ = sparse_graph(graph, self._x, None)
            one.write(graph, self._x, False, path)
        return one.open(read(path, trust=True), threads)


@torch.no_grad()
def _eager(model: nn.Module, x: Tensor, threads: int) -> Runner:
    """The model as it is, in the memory layout that is faster."""
    plain = copy.deepcopy(model).eval()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    y = x.to(memory_format=torch.channels_last)
    runners = [module_runner(plain, threads), module_runner(last, threads)]
    seconds = medians([lambda: runners[0](x), lambda: runners[1](y)], 5, _WARM_SECONDS)
    if seconds[0][1] <= seconds[1][1]:
        return runners[0]
    return lambda image: runners[1](image if image is not x else y)


def _compiled(graph: nn.Module, x: Tensor, threads: int) -> Runner:
    """``torch.compile`` with frozen weights, channels last."""
    torch.compiler.reset()
    frozen = copy.deepcopy(graph).to(memory_format=torch.channels_last)
    run = module_runner(torch.compile(frozen, options={"freezing": True}), threads)
    y = x.to(memory_format=torch.channels_last)
    run(y)
    return lambda image: run(image if image is not x else y)


@torch.no_grad()
def compare_layers(
    sparsities: Sequence[float],
    layers: Sequence[tuple[int, int, int]] = LAYERS,
    threads: Sequence[int] = (1,),
    repeats: int = 25,
    progress: Progress = iter,
    blocked: bool = False,
) -> list[Measurement]:
    """Time 1x1 convolutions: the best of torch's dense ways against the kernel, by turns, medians.

    Args:
        sparsities: shares of zeros.
        layers: input channels, output channels, side of the image.
        threads: numbers of threads.
        repeats: timed calls per case.
        progress: wraps the list of pieces of work.
        blocked: zeros come in blocks of four input channels, and the kernel computes in INT8, too.

    Raises:
        KernelUnavailable: where there is no compiler.
        ValueError: for blocks of four of other numbers of channels.
    """
    load_kernel()
    odd = [inputs for inputs, _, _ in layers if blocked and inputs % 4]
    if odd:
        raise ValueError(f"a layer of {odd[0]} input channels in blocks of four: expected a multiple of 4")
    found = []
    for number, (inputs, outputs, side) in progress(list(itertools.product(threads, layers))):
        with torch_threads(number):
            x, weight = torch.randn(1, inputs, side, side), torch.randn(outputs, inputs, 1, 1) / inputs**0.5
            bias, size = torch.randn(outputs), 4 if blocked else 1
            pruned = [_pruned(weight, sparsity, size) for sparsity in sparsities]
            functions = [*_dense_ways(x, weight, bias), *(_sparse_way(x, one, bias) for one in pruned)]
            functions += [_byte_way(x, one) for one in pruned if blocked]
            times = medians(functions, repeats, _WARM_SECONDS)
        dense = min(times[:3], key=lambda pair: pair[0])
        name = f"{inputs} -> {outputs} @ {side}x{side}"
        words = kernels_of("torch")
        found.append(Measurement(name, 0.0, "torch, best of three", number, *dense, kernels=words))
        ours = [(s, "sparse", FLOAT32) for s in sparsities] + [(s, "sparse int8", INT8) for s in sparsities if blocked]
        for (sparsity, engine, precision), taken in zip(ours, times[3:], strict=True):
            words = kernels_of(engine)
            found.append(Measurement(name, sparsity, engine, number, *taken, precision=precision, kernels=words))
    return found


def _dense_ways(x: Tensor, weight: Tensor, bias: Tensor) -> list[Callable[[], Tensor]]:
    last = [tensor.to(memory_format=torch.channels_last) for tensor in (x, weight)]
    matrix, pixels = weight.flatten(1), x.flatten(2)[0]
    return [
        lambda: F.conv2d(x, weight, bias),
        lambda: F.conv2d(last[0], last[1], bias),
        lambda: torch.addmm(bias[:, None], matrix, pixels),
    ]


def _pruned(weight: Tensor, sparsity: float, size: int) -> Tensor:
    """Without the smallest blocks of so many input channels."""
    count = round(weight.numel() / size * sparsity)
    return solve(
        weight.flatten(1)[None], None, count if size == 1 else Blocks(count, size), "magnitude"
    ).weight.view_as(weight)


def _sparse_way(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    call = ConvCall(Geometry(x.shape[1], len(weight)), *compress(weight), bias)
    return lambda: call(x)


def _byte_way(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """From bytes to bytes, as in a network that is computed in INT8."""
    largest = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    values = (weight / largest * 127).round().to(torch.int8)
    finish = Finish(largest.flatten() / 127, zero=128)
    call = ByteConvCall(Geometry(x.shape[1], len(weight)), *compress_bytes(values), None, 128, finish).plan(1)
    given = to_blocks((x * 32 + 128).round().clamp(0, 255).to(torch.uint8))
    return lambda: call(given)[0]


def speedups(
    found: Sequence[Measurement], cpu: bool = False, any_precision: bool = False
) -> list[tuple[Measurement, float]]:
    """Each measurement with how many times as fast it is as the fastest dense engine of its case and threads.

    Args:
        found: of one run.
        cpu: by the processor's time.
        any_precision: against the fastest of all; else of the same class of accuracy: float32, or INT8 and bfloat16.
    """

    def seconds(m: Measurement) -> float:
        return m.cpu_seconds if cpu else m.seconds

    def kind(m: Measurement) -> tuple[str, int, int, bool]:
        return m.case, m.batch_size, m.threads, any_precision or m.precision == FLOAT32

    best: dict[tuple[str, int, int, bool], float] = {}
    for m in found:
        if m.sparsity == min(o.sparsity for o in found if o.case == m.case) and m.engine not in _OURS:
            best[kind(m)] = min(best.get(kind(m), seconds(m)), seconds(m))
    return [(m, best.get(kind(m), float("nan")) / seconds(m)) for m in found]


def machine() -> str:
    """Processor and versions, in words, to stand beside every figure."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino", "timm") if find_spec(name)]
    kernel = f"kernel: {kernel_target() if kernel_problem() is None else 'none'}"
    has = "/".join(instructions()) or "unknown instructions"
    return ", ".join(
        [processor or platform.machine(), f"{cores} cores", has, kernel, *versions, time.strftime("%Y-%m-%d")]
    )
