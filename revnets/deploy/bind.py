"""Layers of a lowered graph bound into plans: as few calls of the kernel as there can be."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..kernels.build import CallStruct, Geometry
from ..kernels.byte_ops import LAYERS as BYTE_LAYERS
from ..kernels.byte_ops import arguments_of
from ..kernels.calls import (
    CatCall,
    ConvCall,
    LinearCall,
    MapCall,
    MaxPoolCall,
    MeanCall,
    ScaleCall,
    SliceCall,
    UpsampleCall,
)
from ..kernels.compressed import conv_geometry, depthwise_geometry
from ..kernels.fuse import fuse
from ..kernels.plan import Call, Plan, Step
from .graph import ATEN, add_constant, argument, calls, clean, constant, is_changed, is_in_place, is_known, sole_name
from .lower import ACTIVATION_OPS, OPS, pair

_FEW = 8  # images: for more, torch multiplies matrices
_FLATTENING = (ATEN.flatten.using_ints, ATEN.view.default, ATEN.reshape.default)


class Bound(nn.Module):
    """A plan as a module of a graph."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return self._plan(*inputs)

    __call__ = forward  # no hooks: layers take microseconds

    def timed(self, *inputs: Tensor) -> tuple[list[Tensor], list[tuple[CallStruct, float]]]:
        """See ``Plan``."""
        return self._plan.timed(*inputs)


class _Layer(NamedTuple):
    """What the kernel computes for a node, from which nodes."""

    call: Call
    reads: tuple[fx.Node, ...]


def bind(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with the kernel's operators replaced by prepared calls, in place: less time per layer, same numbers.

    Layers that follow each other become one call; sums, gates, concatenations and the like only where layers are near.
    """
    _split_to_slices(graph)
    _linear_to_images(graph)
    run: dict[fx.Node, _Layer] = {}
    number = 0
    for node in list(graph.graph.nodes):
        layer = _prepared(graph, node)
        if layer is not None:
            run[node] = layer
        elif node.op in ("call_function", "call_module", "call_method", "output") and run:
            if any(_is_weighty(one) for one in run.values()):
                _replace_run(graph, run, f"kernel_{number}")
                number += 1
            run = {}
    clean(graph)
    return graph


def _is_weighty(layer: _Layer) -> bool:
    if getattr(layer.call, "takes_bytes", False) or getattr(layer.call, "gives_bytes", False):
        return True
    return isinstance(layer.call, ConvCall | LinearCall | MeanCall | MaxPoolCall | UpsampleCall)


def _split_to_slices(graph: fx.GraphModule) -> None:
    """Parts of a split, taken one by one, as slices."""
    for node in calls(graph, ATEN.split_with_sizes.default, ATEN.split.Tensor, ATEN.chunk.default):
        parts, dim = node.meta.get("val"), argument(node, "dim")
        if not isinstance(parts, (list, tuple)):
            continue
        sizes = [part.shape[dim] for part in parts]
        for item in list(node.users):
            index: Any = item.args[1] if item.target is operator.getitem else None
            if not isinstance(index, int) or not all(isinstance(size, int) for size in sizes):
                continue
            first = sum(sizes[:index])
            with graph.graph.inserting_before(item):
                part = graph.graph.call_function(ATEN.slice.Tensor, (node.args[0], dim, first, first + sizes[index]))
            part.meta.update(item.meta)
            item.replace_all_uses_with(part)
            graph.graph.erase_node(item)
        if not node.users:
            graph.graph.erase_node(node)


def _linear_to_images(graph: fx.GraphModule) -> None:
    """Linear layers of what is images of one pixel, flattened, as convolutions of those, flattened afterwards.

    Only of few images, a number that is known: of many, torch's products of matrices are faster.
    """
    for node in calls(graph, ATEN.linear.default):
        flat: Any = argument(node, "input")
        weight, value = constant(graph, argument(node, "weight")), node.meta.get("val")
        if weight is None or not is_known(graph, argument(node, "bias")) or not isinstance(flat, fx.Node):
            continue
        source: Any = flat.args[0] if flat.target in _FLATTENING else None
        if not _is_image(source) or _sizes(source) != [weight.shape[1], 1, 1] or not isinstance(value, Tensor):
            continue
        if not isinstance(value.shape[0], int) or value.shape[0] > _FEW or value.dim() != 2:
            continue
        with graph.graph.inserting_before(node):
            window = add_constant(graph, f"{node.name}_window", weight.detach()[:, :, None, None])
            image = graph.graph.call_function(ATEN.conv2d.default, (source, window, argument(node, "bias")))
            image.meta["val"] = value[:, :, None, None]
            new = graph.graph.call_function(ATEN.flatten.using_ints, (image, 1))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        if not flat.users:
            graph.graph.erase_node(flat)


def _replace_run(graph: fx.GraphModule, run: dict[fx.Node, _Layer], name: str) -> None:
    """Nodes in order, with nothing computed between them, as one."""
    inputs = list(dict.fromkeys(node for layer in run.values() for node in layer.reads if node not in run))
    outputs = [node for node in run if any(user not in run for user in node.users)]
    numbers = {node: i for i, node in enumerate([*inputs, *run])}
    steps = [Step(layer.call, tuple(numbers[node] for node in layer.reads)) for layer in run.values()]
    steps, returned = fuse(steps, len(inputs), [numbers[node] for node in outputs])
    graph.add_module(name, Bound(Plan(steps, len(inputs), returned)))
    with graph.graph.inserting_after(list(run)[-1]):
        new = graph.graph.call_module(name, tuple(inputs))
    with graph.graph.inserting_after(new):
        for place, node in enumerate(outputs):
            item = graph.graph.call_function(operator.getitem, (new, place))
            item.meta.update(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in run)
    for node in reversed(list(run)):
        graph.graph.erase_node(node)


# --- what the kernel computes ----------------------------------------------------------------------------------------


def _prepared(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    """The layer for a node that the kernel computes, with weights that are known; None for all others."""
    if node.op == "call_function" and node.target in BYTE_LAYERS:
        return _of_bytes(graph, node)
    if node.op != "call_function" or not _is_image(node):
        return None
    activation = ACTIVATION_OPS.get(node.target)
    if activation is not None:
        return _map(node, activation)
    prepare = _PREPARE.get(node.target)
    return None if prepare is None else prepare(graph, node)


def _of_bytes(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    """An operator whose weights are known."""
    layer = BYTE_LAYERS[node.target]
    given = arguments_of(node.target, node.args, node.kwargs)
    reads = [given.pop(name) for name in layer.operands]
    if not all(is_known(graph, value) for value in given.values() if isinstance(value, fx.Node)):
        return None
    weights = {name: constant(graph, value) if isinstance(value, fx.Node) else value for name, value in given.items()}
    return _Layer(layer.call(weights), tuple(read for read in reads if read is not None))


def _is_image(node: Any) -> bool:
    """Whether a node's value is (N, C, H, W) of one batch size, float32, on the CPU."""
    example = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(example, Tensor) or example.dim() != 4:
        return False
    return str(example.dtype) == "torch.float32" and example.device.type == "cpu"


def _sizes(node: fx.Node) -> list[int]:
    """Channels, height and width."""
    return [int(size) for size in node.meta["val"].shape[1:]]


def _conv(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    source: Any = node.args[0]
    bias, activation = constant(graph, argument(node, "bias")), argument(node, "activation")
    if not is_known(graph, argument(node, "bias")):
        return None
    residual = argument(node, "residual")
    reads = (source,) if residual is None else (source, residual)
    if node.target == OPS.depthwise_conv2d.default:
        weight = constant(graph, argument(node, "weight"))
        if weight is None:
            return None
        geometry = depthwise_geometry(weight, argument(node, "stride"), argument(node, "padding"))
        return _Layer(ConvCall(geometry, weight, None, None, bias, activation), reads)
    values, columns, rows = (constant(graph, argument(node, name)) for name in ("values", "columns", "rows"))
    if values is None or columns is None or rows is None or not _is_image(source):
        return None
    settings = [argument(node, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")]
    geometry = conv_geometry(source.meta["val"], rows, *settings)
    return _Layer(ConvCall(geometry, values, columns, rows, bias, activation), reads)


def _linear(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    """A convolution that is a linear layer of images of one pixel."""
    source, (weight, bias) = node.args[0], (constant(graph, argument(node, name)) for name in ("weight", "bias"))
    if weight is None or not is_known(graph, argument(node, "bias")) or not _is_image(source):
        return None
    if argument(node, "groups") != 1 or _sizes(source)[1:] != [1, 1] or _sizes(node)[1:] != [1, 1]:  # type: ignore[arg-type]
        return None
    if tuple(weight.shape[2:]) != (1, 1) or weight.dtype is not torch.float32:
        return None
    return _Layer(LinearCall(weight.flatten(1), bias), (source,))  # type: ignore[arg-type]


def _mean(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    source: Any = node.args[0]
    pixels = sorted(d % 4 for d in argument(node, "dim")) == [2, 3] and bool(argument(node, "keepdim"))
    is_mean = _is_image(source) and pixels and argument(node, "dtype") is None
    return _Layer(MeanCall(), (source,)) if is_mean else None


def _map(node: fx.Node, activation: str) -> _Layer | None:
    source: Any = node.args[0]
    if not _is_image(source) or (is_in_place(node) and not sole_name(source, node)):
        return None  # others would see the change
    return _Layer(MapCall(activation), (source,))


def _product(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    x, gate = node.args[:2]
    if not (_is_image(x) and _is_image(gate)):
        return None
    if _sizes(x)[1:] == [1, 1]:  # type: ignore[arg-type]
        x, gate = gate, x
    same_batch = x.meta["val"].shape[0] == gate.meta["val"].shape[0]  # type: ignore[union-attr]
    if not same_batch or _sizes(gate) != [_sizes(x)[0], 1, 1]:  # type: ignore[arg-type]
        return None
    return _Layer(ScaleCall(), (x, gate))  # type: ignore[arg-type]


def _sum(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    a, b = node.args[:2]
    if not (_is_image(a) and _is_image(b)) or a.meta["val"].shape != b.meta["val"].shape:  # type: ignore[union-attr]
        return None
    if argument(node, "alpha") != 1 or (is_in_place(node) and not sole_name(a, node)):
        return None
    return _Layer(MapCall(), (a, b))  # type: ignore[arg-type]


def _slice(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    source: Any = node.args[0]
    first, last, step = argument(node, "start") or 0, argument(node, "end"), argument(node, "step")
    if not _is_image(source) or argument(node, "dim") % 4 != 1 or step != 1 or not isinstance(last, int):
        return None
    if is_changed(node, after=node):
        return None  # a slice is a view, ours is none
    channels = _sizes(source)[0]
    last = min(last, channels)
    return _Layer(SliceCall(first, last - first), (source,)) if 0 <= first < last else None


def _cat(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    parts: Any = node.args[0]
    if argument(node, "dim") % 4 != 1 or not all(_is_image(part) for part in parts):
        return None
    return _Layer(CatCall(), tuple(parts))


def _upsample(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    source: Any = node.args[0]
    if not _is_image(source) or argument(node, "align_corners"):
        return None
    (_, *small), (_, *large) = _sizes(source), _sizes(node)
    factors = [b // a for a, b in zip(small, large, strict=True)]
    if min(factors) < 2 or [a * factor for a, factor in zip(small, factors, strict=True)] != large:
        return None
    scales = argument(node, "scale_factors")
    if scales is not None and [float(scale) for scale in scales] != factors:
        return None
    return _Layer(UpsampleCall((factors[0], factors[1])), (source,))


def _max_pool(graph: fx.GraphModule, node: fx.Node) -> _Layer | None:
    source: Any = node.args[0]
    size = pair(argument(node, "kernel_size"))
    stride, padding = pair(argument(node, "stride") or size), pair(argument(node, "padding"))
    if not _is_image(source) or pair(argument(node, "dilation")) != (1, 1) or argument(node, "ceil_mode"):
        return None
    channels = _sizes(source)[0]
    return _Layer(MaxPoolCall(Geometry(channels, channels, size, stride, padding)), (source,))


_PREPARE: dict[Any, Callable[[fx.GraphModule, fx.Node], _Layer | None]] = {
    OPS.sparse_conv2d.default: _conv,
    OPS.depthwise_conv2d.default: _conv,
    ATEN.conv2d.default: _linear,
    ATEN.mean.dim: _mean,
    ATEN.mul.Tensor: _product,
    ATEN.add.Tensor: _sum,
    ATEN.add_.Tensor: _sum,
    ATEN.slice.Tensor: _slice,
    ATEN.cat.default: _cat,
    ATEN.upsample_bilinear2d.vec: _upsample,
    ATEN.max_pool2d.default: _max_pool,
}
