"""Layers of a graph swapped for the kernel: sparse ones where that is faster, depthwise ones, and what follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..kernels.build import Geometry
from ..kernels.calls import ConvCall
from ..kernels.compressed import (
    MAX_COLUMNS,
    MAX_POSITIONS,
    compress,
    density,
)
from ..profiling.turns import medians
from .graph import ATEN, add_constant, argument, calls, clean, constant, is_changed, is_in_place, sole_name

OPS = torch.ops.revnets
ACTIVATION_OPS: dict[Any, str] = {  # what the kernel has
    ATEN.relu.default: "relu",
    ATEN.relu_.default: "relu",
    ATEN.relu6.default: "relu6",
    ATEN.hardswish.default: "hardswish",
    ATEN.hardswish_.default: "hardswish",
    ATEN.hardsigmoid.default: "hardsigmoid",
    ATEN.hardsigmoid_.default: "hardsigmoid",
    ATEN.silu.default: "silu",
    ATEN.silu_.default: "silu",
    ATEN.sigmoid.default: "sigmoid",
    ATEN.sigmoid_.default: "sigmoid",
}
# Seconds per byte of output that torch writes into pages that it has just been given (0.24 ms of 0.6 in the stem of
# MobileNet); layers of the kernel share their memory.
NEW_MEMORY = 1.5e-10
_TIMES = 8  # that a layer of the kernel is timed in one call: threads are woken once for a whole network
Sizes = dict[fx.Node, tuple[int, ...]]
_ADDS = (ATEN.add.Tensor, ATEN.add_.Tensor)


@dataclass(frozen=True)
class Layer:
    """What became of a layer.

    Attributes:
        name: of its node.
        shape: of its weight.
        pixels: of its output, height times width (of a linear layer: rows of the input).
        density: share of weights that are not 0.
        choice: ``sparse``, ``depthwise`` or ``dense``.
        reason: why.
        dense_seconds: torch's time, where it was measured.
        sparse_seconds: the kernel's.
    """

    name: str
    shape: tuple[int, ...]
    pixels: int
    density: float
    choice: str
    reason: str
    dense_seconds: float | None = None
    sparse_seconds: float | None = None


def lower(graph: fx.GraphModule, x: Tensor, max_density: float | None = None, repeats: int = 7) -> list[Layer]:
    """Swap layers of the graph for the kernel, in place: same outputs, the zeros skipped.

    Args:
        graph: of ``export_graph``.
        x: an example of the input; layers are timed on the sizes that it makes.
        max_density: swap the layers that have no more weights than this share; None: those that are faster, measured.
        repeats: timed runs of each layer, dense and sparse by turns.

    Returns:
        every convolution and linear layer with what became of it.

    Example:
        >>> from revnets.deploy.graph import export_graph
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()).eval()
        >>> net[0].weight.data[:, 2:] = 0
        >>> x = torch.randn(2, 8, 8, 8)
        >>> graph = export_graph(net, x)
        >>> [(layer.choice, layer.density) for layer in lower(graph, x, max_density=0.5)]
        [('sparse', 0.25)]
        >>> torch.allclose(graph(x), net(x), atol=1e-6)
        True
    """
    shapes = _shapes(graph, x)
    layers = []
    for node in calls(graph, ATEN.conv2d.default, ATEN.linear.default):
        weight = constant(graph, argument(node, "weight"))
        size, is_conv = shapes.get(argument(node, "input")), node.target == ATEN.conv2d.default
        if weight is None or size is None or (is_conv and len(size) != 4):  # without a batch: torch's
            continue
        decide = _decide_conv if is_conv else _decide_linear
        layer = decide(graph, node, weight, shapes, max_density, repeats)
        layers.append(layer)
        if layer.choice != "dense":
            swap = _swap_conv if is_conv else _swap_linear
            swap(graph, node, weight, layer.choice, shapes)
    for pool in calls(graph, ATEN.adaptive_avg_pool2d.default):  # torch's is slow in this memory order
        if list(argument(pool, "output_size")) == [1, 1]:
            with graph.graph.inserting_before(pool):
                mean = graph.graph.call_function(ATEN.mean.dim, (pool.args[0], [2, 3], True))
            mean.meta.update(pool.meta)
            pool.replace_all_uses_with(mean)
            graph.graph.erase_node(pool)
    clean(graph)
    return layers


# --- which layers ----------------------------------------------------------------------------------------------------


class _Shapes(fx.Interpreter):
    """Runs the graph and notes the shape of every node's value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: Sizes = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            self.found[n] = tuple(value.shape)
        return value


@torch.no_grad()
def _shapes(graph: fx.GraphModule, x: Tensor) -> Sizes:
    shapes = _Shapes(graph)
    shapes.run(x)
    return shapes.found


def _decide_conv(
    graph: fx.GraphModule,
    node: fx.Node,
    weight: Tensor,
    shapes: Sizes,
    max_density: float | None,
    repeats: int,
) -> Layer:
    geometry, size = node_geometry(node, weight), shapes[argument(node, "input")]
    h_out, w_out = geometry.output_size(*size[2:])
    known = (node.name, tuple(weight.shape), h_out * w_out, density(weight))
    if geometry.is_depthwise:
        return Layer(*known, "depthwise", "dense weights, in the sparse layers' memory order")
    pads = [side + 2 * pad + 16 for side, pad in zip(size[2:], geometry.padding, strict=True)]
    if weight[0].numel() > MAX_COLUMNS or geometry.in_channels * pads[0] * pads[1] >= MAX_POSITIONS:
        return Layer(*known, "dense", "too large for the kernel's offsets")
    bias = constant(graph, argument(node, "bias"))
    x = torch.randn(size, device=weight.device)

    def dense() -> Tensor:
        return F.conv2d(x, weight, bias, *_numbers(geometry))

    def sparse() -> Callable[[], Any]:
        return ConvCall(geometry, *compress(weight), bias).plan(1, _TIMES).fixed(x)

    return _decide(known, dense, sparse, max_density, repeats, _TIMES)


def _decide_linear(
    graph: fx.GraphModule,
    node: fx.Node,
    weight: Tensor,
    shapes: Sizes,
    max_density: float | None,
    repeats: int,
) -> Layer:
    size = shapes[argument(node, "input")]
    known = (node.name, tuple(weight.shape), int(torch.Size(size[:-1]).numel()), density(weight))
    if weight.shape[1] > MAX_COLUMNS:
        return Layer(*known, "dense", "too large for the kernel's offsets")
    bias = constant(graph, argument(node, "bias"))
    x = torch.randn(size, device=weight.device)

    def sparse() -> Callable[[], Tensor]:
        parts = compress(weight)
        return lambda: OPS.sparse_linear.default(x, *parts, bias)

    return _decide(known, lambda: F.linear(x, weight, bias), sparse, max_density, repeats)


def _decide(
    known: tuple[str, tuple[int, ...], int, float],
    dense: Callable[[], Tensor],
    make_sparse: Callable[[], Callable[[], Any]],
    max_density: float | None,
    repeats: int,
    times: int = 1,
) -> Layer:
    share = known[3]
    if max_density is not None:
        sparse = share <= max_density
        relation = "at most" if sparse else "more than"
        return Layer(*known, "sparse" if sparse else "dense", f"density {share:.2f}, {relation} {max_density}")
    inputs = torch.Size(known[1][1:]).numel()
    if share > 0.6 and inputs > 64 and known[2] > 16:  # never faster: the kernel needs a load for every multiplication
        return Layer(*known, "dense", f"density {share:.2f}")
    slow, fast = interleaved([dense, make_sparse()], repeats)
    fast /= times
    saved = NEW_MEMORY * 4 * known[1][0] * known[2]
    choice = "sparse" if fast < slow + saved else "dense"
    return Layer(*known, choice, f"measured: {slow / fast:.2f} times as fast, without new memory", slow, fast)


@torch.no_grad()
def interleaved(functions: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each function, all of them by turns, each called once before."""
    return [wall for wall, _ in medians(functions, repeats)]


# --- the swap --------------------------------------------------------------------------------------------------------


def node_geometry(node: fx.Node, weight: Tensor) -> Geometry:
    """The geometry of a convolution's node."""
    stride, padding, dilation = (pair(argument(node, name)) for name in ("stride", "padding", "dilation"))
    groups = argument(node, "groups")
    return Geometry(
        weight.shape[1] * groups, weight.shape[0], pair(weight.shape[2:]), stride, padding, dilation, groups
    )


def pair(value: Any) -> tuple[int, int]:
    """Height's and width's of an argument that may be one number for both."""
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return values[0], values[-1]


def _numbers(g: Geometry) -> tuple[Any, ...]:
    return g.stride, g.padding, g.dilation, g.groups


@dataclass(frozen=True)
class _Tail:
    """What follows a convolution and is computed with it."""

    last: fx.Node
    residual: fx.Node | None
    activation: str


def _tail(conv: fx.Node) -> _Tail:
    """The addition and the activation that read the convolution alone."""
    source, last = argument(conv, "input"), conv  # the swap reads later what may be changed by then
    residual: Any = None
    user = _only_user(last)
    if user is not None and user.target in _ADDS and argument(user, "alpha") == 1:
        others = [arg for arg in user.args[:2] if arg is not last]
        if len(others) == 1 and _can_be_added(others[0], user, conv) and not is_changed(source, conv, user):
            last, residual = user, others[0]
    user = _only_user(last)
    name = None if user is None else _activation(user)
    if user is None or name is None or is_changed(source, conv, user):
        return _Tail(last, residual, "none")
    if residual is not None and is_changed(residual, last, user):
        return _Tail(last, residual, "none")
    return _Tail(user, residual, name)


def _activation(node: fx.Node) -> str | None:
    """The kernel's name for what a node computes."""
    if node.target in (ATEN.hardtanh.default, ATEN.hardtanh_.default):
        return "relu6" if (argument(node, "min_val"), argument(node, "max_val")) == (0, 6) else None
    return ACTIVATION_OPS.get(node.target)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _can_be_added(other: Any, addition: fx.Node, conv: fx.Node) -> bool:
    """Whether both summands are alike, and nobody else sees that an addition in place changes the other one."""
    if not isinstance(other, fx.Node):
        return False
    if is_in_place(addition) and addition.args[0] is other and not sole_name(other, addition):
        return False
    a, b = (node.meta.get("val") for node in (other, conv))
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _swap_conv(graph: fx.GraphModule, node: fx.Node, weight: Tensor, choice: str, shapes: Sizes) -> None:
    geometry, tail = node_geometry(node, weight), _tail(node)
    source, bias = argument(node, "input"), argument(node, "bias")
    stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    with graph.graph.inserting_before(tail.last):
        if choice == "depthwise":
            rest = (bias, tail.residual, stride, padding, tail.activation)
            new = graph.graph.call_function(OPS.depthwise_conv2d.default, (source, argument(node, "weight"), *rest))
        else:
            parts = _compressed_nodes(graph, node, weight)
            settings = (list(geometry.kernel_size), stride, padding, dilation, geometry.groups, tail.activation)
            arguments = (source, *parts, bias, tail.residual, *settings)
            new = graph.graph.call_function(OPS.sparse_conv2d.default, arguments)
    _replace(graph, node, tail.last, new, shapes)


def _swap_linear(graph: fx.GraphModule, node: fx.Node, weight: Tensor, choice: str, shapes: Sizes) -> None:
    with graph.graph.inserting_before(node):
        arguments = (argument(node, "input"), *_compressed_nodes(graph, node, weight), argument(node, "bias"))
        new = graph.graph.call_function(OPS.sparse_linear.default, arguments)
    _replace(graph, node, node, new, shapes)


def _compressed_nodes(graph: fx.GraphModule, node: fx.Node, weight: Tensor) -> list[fx.Node]:
    names = ("values", "columns", "rows")
    return [add_constant(graph, f"{node.name}_{n}", t) for n, t in zip(names, compress(weight), strict=True)]


def _replace(graph: fx.GraphModule, first: fx.Node, last: fx.Node, new: fx.Node, shapes: Sizes) -> None:
    new.meta["val"] = last.meta.get("val")
    shapes[new] = shapes[last]
    last.replace_all_uses_with(new)
    while last is not first:  # backwards along what was fused
        before = next(arg for arg in last.args if isinstance(arg, fx.Node) and _leads_from(first, arg))
        graph.graph.erase_node(last)
        last = before
    graph.graph.erase_node(first)


def _leads_from(first: fx.Node, node: fx.Node) -> bool:
    """Whether a node is the convolution, or is what was fused directly behind it."""
    return node is first or (first in node.all_input_nodes and list(first.users) == [node])
