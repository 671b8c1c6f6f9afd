"""What each layer of a network takes, within a run of the whole: in our kernel and in OpenVINO."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..kernels.build import (
    CONVOLUTION,
    COPY,
    DEPTHWISE,
    LINEAR,
    MAP,
    MAX_POOL,
    MEAN,
    SCALE,
    UPSAMPLE,
    CallStruct,
    load_kernel,
)
from .bind import Bound, bind
from .engines import ENGINES, sparse_graph
from .graph import export_graph
from .runners import openvino_core, torch_threads

_KINDS = {
    MEAN: "means",
    SCALE: "gates",
    MAP: "sums, activations",
    COPY: "slices, concatenations",
    UPSAMPLE: "upsampling",
    MAX_POOL: "max pooling",
}
_THEIRS = {
    "ReduceMean": "means",
    "Multiply": "gates",
    "Subgraph": "gates",  # a product with what is beside it
    "HardSigmoid": "images of one pixel",
    "Add": "sums, activations",
    "VariadicSplit": "slices, concatenations",
    "StridedSlice": "slices, concatenations",
    "Concat": "slices, concatenations",
    "Interpolate": "upsampling",
    "MaxPool": "max pooling",
    "FullyConnected": "linear layers",
}


@dataclass(frozen=True)
class LayerTime:
    """What a layer took.

    Attributes:
        case: network.
        sparsity: share of zeros in what was pruned.
        engine: ``sparse`` or ``openvino``.
        threads: of the engine.
        kind: of layer, in words that are the same for both.
        name: what the engine calls it, or the kernel's call.
        seconds: median of the clock's time; of OpenVINO, which counts means of whole microseconds, the mean.
    """

    case: str
    sparsity: float
    engine: str
    threads: int
    kind: str
    name: str
    seconds: float


@torch.no_grad()
def layer_times(
    model: nn.Module,
    x: Tensor,
    engines: Sequence[str] = (),
    threads: int = 1,
    repeats: int = 25,
    case: str = "",
    sparsity: float = 0.0,
) -> list[LayerTime]:
    """Times of the layers of a network, those that are computed together as one.

    Args:
        model: in eval mode.
        x: the images of a call.
        engines: ``sparse``, ``openvino`` or both, others are left out; none for those that are installed.
        threads: of both engines.
        repeats: runs of the whole network.
        case: its name.
        sparsity: share of zeros in its pruned layers.

    Raises:
        KernelUnavailable: where there is no compiler.
    """
    graph = export_graph(model, x, any_batch=False)
    found: list[LayerTime] = []
    if not engines or "sparse" in engines:
        load_kernel()
        with torch_threads(threads):
            ours = _kernel(bind(sparse_graph(graph, x, None)[0]), x, repeats)
        found += [LayerTime(case, sparsity, "sparse", threads, *row) for row in ours]
    if "openvino" in engines or (not engines and not ENGINES["openvino"].missing()):
        theirs = _openvino(graph, x, threads, repeats)
        found += [LayerTime(case, sparsity, "openvino", threads, *row) for row in theirs]
    return found


# --- ours ------------------------------------------------------------------------------------------------------------


class _Timed(fx.Interpreter):
    """Runs a bound graph and notes what its nodes and the calls within them take."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.rows: list[tuple[str, str, float]] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, Bound):
            return super().call_module(target, args, kwargs)
        outputs, calls = module.timed(*args)
        self.rows += [(*_described(struct), seconds) for struct, seconds in calls]
        return outputs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        start = time.perf_counter()
        value = super().call_function(target, args, kwargs)
        seconds, name = time.perf_counter() - start, str(target)
        if name.startswith("aten.linear") or "sparse_linear" in name:
            self.rows.append(("linear layers", name, seconds))
        elif "getitem" not in name:
            self.rows.append(("others", name, seconds))
        return value


def _kernel(graph: fx.GraphModule, x: Tensor, repeats: int) -> list[tuple[str, str, float]]:
    runs = []
    for _ in range(repeats):
        timed = _Timed(graph)
        timed.run(x)
        runs.append(timed.rows)
    return [(*rows[0][:2], statistics.median(row[2] for row in rows)) for rows in zip(*runs, strict=True)]


def _described(c: CallStruct) -> tuple[str, str]:
    """Kind of a call of the kernel, and its numbers in words."""
    size = f"{c.c_in} -> {c.c_out} @ {c.h_out}x{c.w_out}"
    window = f"{c.kh}x{c.kw}" + (f" / {c.stride_h}" if max(c.stride_h, c.stride_w) > 1 else "")
    more = "".join(f", {name}" for name in ("residual", "gates", "means") if getattr(c, name))
    if c.kind == LINEAR:
        return "images of one pixel", size + more
    if c.kind not in (CONVOLUTION, DEPTHWISE):
        return _KINDS.get(c.kind, "of bytes"), size + more
    if c.kind == DEPTHWISE:
        return f"depthwise {window}", size + more
    kind = "images of one pixel" if c.h_out * c.w_out == 1 else f"convolution {window}"
    return kind, size + more


# --- OpenVINO's ------------------------------------------------------------------------------------------------------


def _openvino(graph: fx.GraphModule, x: Tensor, threads: int, repeats: int) -> list[tuple[str, str, float]]:
    core = openvino_core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.xml"
        ENGINES["openvino"].write(graph, x, False, path)
        model = core.read_model(str(path))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    compiled = core.compile_model(model, "CPU", {**settings, "INFERENCE_PRECISION_HINT": "f32"})
    request, image = compiled.create_infer_request(), x.numpy()
    request.infer({0: image})
    first = {layer.node_name: layer.real_time.total_seconds() for layer in request.profiling_info}
    for _ in range(repeats):
        request.infer({0: image})
    windows = {op.get_friendly_name(): op for op in model.get_ops()}
    rows = []
    for layer in request.profiling_info:  # it gives the mean of all runs until now
        total = (repeats + 1) * layer.real_time.total_seconds()
        seconds = max(0.0, total - first[layer.node_name]) / repeats
        rows.append((_their_kind(windows.get(layer.node_name), layer.node_type), layer.node_name, seconds))
    return [row for row in rows if row[2]]


def _their_kind(op: Any, node_type: str) -> str:
    """Kind of one of OpenVINO's layers, in our words."""
    if op is None or node_type not in ("Convolution", "GroupConvolution"):
        return _THEIRS.get(node_type, "others")
    window, stride = list(op.input(1).get_shape())[-2:], max(op.get_attributes()["strides"])
    words = f"{window[0]}x{window[1]}" + (f" / {stride}" if stride > 1 else "")
    if node_type == "GroupConvolution":
        return f"depthwise {words}"
    return "images of one pixel" if list(op.output(0).get_shape())[2:] == [1, 1] else f"convolution {words}"


def by_kind(found: Sequence[LayerTime]) -> list[tuple[str, dict[str, tuple[int, float]]]]:
    """Kinds of layers with how many calls each engine makes of them and their seconds, what takes longest first.

    Example:
        >>> two = [LayerTime("", 0, "sparse", 1, "means", str(i), 0.5) for i in range(2)]
        >>> by_kind(two)
        [('means', {'sparse': (2, 1.0)})]
    """
    kinds: dict[str, dict[str, tuple[int, float]]] = {}
    for one in found:
        number, seconds = kinds.setdefault(one.kind, {}).get(one.engine, (0, 0.0))
        kinds[one.kind][one.engine] = number + 1, seconds + one.seconds
    return sorted(kinds.items(), key=lambda item: -max(seconds for _, seconds in item[1].values()))
