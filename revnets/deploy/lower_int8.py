"""A graph's layers as layers of bytes of the kernel: ranges of activations from images, weights per channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import byte_ops as byte_ops
from ..kernels.byte_blocks import compress_bytes
from ..kernels.compressed import activate
from ..training.errors import refused
from .graph import (
    ATEN,
    ExportError,
    add_constant,
    argument,
    clean,
    constant,
    is_changed,
    is_in_place,
    is_known,
    sole_name,
)
from .int8_ranges import Observed, Range, quantised_weights
from .lower import OPS, _activation, _Tail, _tail, node_geometry, pair

_SHARE = 1e-4  # of the numbers that "percentile" leaves beyond each end of a range
_ADDS = (ATEN.add.Tensor, ATEN.add_.Tensor)
_VIEWS = (ATEN.flatten.using_ints, ATEN.view.default, ATEN.reshape.default, ATEN.squeeze.dims)


@dataclass(frozen=True)
class Converted:
    """What became of the graph.

    Attributes:
        layers: convolutions and linear layers of bytes.
        others: layers without weights.
        left: convolutions and linear layers that stay float.
        weights: how many are INT8.
        zeros: how many of them are 0.
    """

    layers: int
    others: int
    left: int
    weights: int
    zeros: int


@torch.no_grad()
def lower_int8(graph: fx.GraphModule, batches: Sequence[Tensor], calibration: str = "minmax") -> Converted:
    """Swap the graph's layers for layers of bytes, in place; what is none stays float, with conversions between.

    Args:
        graph: of ``export_graph``.
        batches: images, to find the ranges of activations.
        calibration: ``minmax``, or ``percentile``: without the outermost of 10,000 numbers at each end.

    Raises:
        ExportError: for images that the graph cannot take.

    Example:
        >>> from torch import nn
        >>> from revnets.deploy.graph import export_graph
        >>> net, x = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()).eval(), torch.rand(2, 8, 8, 8)
        >>> graph = export_graph(net, x)
        >>> lower_int8(graph, [x]).layers
        1
        >>> float((graph(x) - net(x)).abs().max()) < 0.05
        True
    """
    seen = Observed(graph, _SHARE if calibration == "percentile" else 0.0)
    for batch in batches:
        with refused(f"the model refuses calibration images of shape {tuple(batch.shape)}", kind=ExportError):
            seen.run(batch)
    return _Lowering(graph, seen).run()


class _Lowering:
    def __init__(self, graph: fx.GraphModule, seen: Observed) -> None:
        self._graph, self._seen = graph, seen
        self._bytes: dict[fx.Node, fx.Node] = {}  # what stands for a float value
        self._ranges: dict[fx.Node, Range] = {}
        self._gone: list[fx.Node] = []  # in order
        self._plain_sums: list[fx.Node] = []  # byte layers that could give floats
        self._counts = {"layers": 0, "others": 0, "left": 0, "weights": 0, "zeros": 0}

    def run(self) -> Converted:
        for node in list(self._graph.graph.nodes):
            if node.op != "call_function" or node in self._gone or node not in self._seen.shapes:
                continue
            lower = _LOWER.get(node.target, _LOWER_ACTIVATION if _activation(node) else None)
            if lower is not None and not lower(self, node) and node.target in _WEIGHTED:
                self._counts["left"] += 1
        self._back_to_floats()
        clean(self._graph)
        return Converted(**self._counts)

    # --- values ---

    def _range(self, node: fx.Node) -> Range:
        if node not in self._ranges:
            self._ranges[node] = Range.of(*self._seen.ends[node])
        return self._ranges[node]

    def _readable(self, node: Any) -> bool:
        """Whether a value can be read as bytes: images, or features of one pixel, that nobody changes in place."""
        if not isinstance(node, fx.Node) or node not in self._seen.shapes:
            return False
        ends = self._seen.ends[node]
        if len(self._seen.shapes[node]) not in (2, 4) or not all(map(math.isfinite, ends)):
            return False
        return node in self._bytes or not is_changed(node, after=node)

    def _settled(self, node: fx.Node) -> bool:
        """Whether nobody sees that its value is changed in place later: no such change, or by its only reader."""
        users = list(node.users)
        return not is_changed(node, after=node) or (len(users) == 1 and sole_name(node, users[0]))

    def _read(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The bytes of a value; a float one is converted."""
        if node not in self._bytes:
            known, source = self._range(node), node
            with self._graph.graph.inserting_before(before):
                for _ in range(4 - len(self._seen.shapes[node])):
                    source = self._graph.graph.call_function(ATEN.unsqueeze.default, (source, -1))
                arguments = (source, known.scale, known.zero)
                self._bytes[node] = self._graph.graph.call_function(OPS.int8_quantize.default, arguments)
        return self._bytes[node]

    def _write(self, nodes: Sequence[fx.Node], operator: Any, **arguments: Any) -> fx.Node:
        """A layer of bytes in the place of nodes that follow each other, of which the last gives the value."""
        last = nodes[-1]
        with self._graph.graph.inserting_before(last):
            new = self._graph.graph.call_function(operator.default, (), arguments)
        self._bytes[last] = new
        self._gone += [node for node in nodes if node not in self._gone]
        return new

    def _back_to_floats(self) -> None:
        """Values that somebody still reads as floats."""
        gone = set(self._gone)
        for node in self._gone:
            readers = [user for user in node.users if user not in gone]
            if not readers:
                continue
            made, known = self._bytes[node], self._range(node)
            shape = self._seen.shapes[node]
            with self._graph.graph.inserting_after(made):
                if made in self._plain_sums and not made.users:
                    new = self._to_float(made, known)
                else:
                    arguments = (made, shape[1], known.scale, known.zero)
                    new = self._graph.graph.call_function(OPS.int8_dequantize.default, arguments)
            if len(shape) == 2:
                with self._graph.graph.inserting_after(new):
                    new = self._graph.graph.call_function(ATEN.flatten.using_ints, (new, 1))
            for user in readers:
                user.replace_input_with(node, new)
        for node in sorted(gone, reverse=True):
            self._graph.graph.erase_node(node)

    def _to_float(self, made: fx.Node, known: Range) -> fx.Node:
        """A layer whose sums are not rounded to bytes at all."""
        scale: Any = constant(self._graph, made.kwargs["scale"])
        more: Any = made.kwargs["residual_scale"]
        new: dict[str, Any] = {"scale": self._constant(made, "plain_scale", scale * known.scale), "to_float": True}
        made.kwargs = {**made.kwargs, **new, "residual_scale": _float32(more * known.scale)}
        return made

    # --- how sums end ---

    def _finish(self, before: fx.Node, last: fx.Node, activation: str) -> tuple[Range, dict[str, Any]]:
        """The range that sums are rounded to, the limits, and the table's node."""
        known = self._range(last)
        limits = {"none": (0, 255), "relu": (known.zero, 255), "relu6": (known.zero, known.byte(6.0))}
        if activation in limits:
            low, high = limits[activation]
            return known, {"zero": known.zero, "low": low, "high": high, "table": None}
        inner = self._range(before)
        values = activate((torch.arange(256) - inner.zero) * inner.scale, activation)
        table = ((values / known.scale).round() + known.zero).clamp(0, 255).to(torch.uint8)
        with self._graph.graph.inserting_before(last):
            node = add_constant(self._graph, f"{last.name}_table", table)
        return inner, {"zero": inner.zero, "low": 0, "high": 255, "table": node}

    def _constant(self, before: fx.Node, name: str, value: Tensor) -> fx.Node:
        with self._graph.graph.inserting_before(before):
            return add_constant(self._graph, f"{before.name}_{name}", value)

    # --- layers with weights ---

    def weighted(self, node: fx.Node) -> bool:
        """A convolution or a linear layer, with the sum and the activation behind it."""
        source, weight = argument(node, "input"), constant(self._graph, argument(node, "weight"))
        if weight is None or not is_known(self._graph, argument(node, "bias")) or not self._readable(source):
            return False
        shape = self._seen.shapes[source]
        is_conv = node.target == ATEN.conv2d.default
        if len(shape) != (4 if is_conv else 2) or not bool(weight.isfinite().all()):
            return False
        tail = _tail(node)
        if tail.residual is not None and node < tail.residual and tail.residual.target in _WEIGHTED:
            tail = _Tail(node, None, "none")  # it comes later: the sum is its affair
        if not self._settled(tail.last) or tail.last not in self._seen.shapes:
            return False
        if tail.residual is not None and not self._readable(tail.residual):
            return False
        nodes = _between(node, tail.last)
        before = nodes[-2] if tail.activation != "none" else nodes[-1]
        known, end = self._finish(before, tail.last, tail.activation)
        quantised, bias, scale = quantised_weights(
            weight, constant(self._graph, argument(node, "bias")), self._range(source).scale, known.scale
        )
        if is_conv and weight[0].numel() // 4 >= 2**15:
            return False
        arguments: dict[str, Any] = {"x": self._read(source, node), "residual": None, "residual_scale": 0.0}
        added = 0
        if tail.residual is not None:
            added_range = self._range(tail.residual)
            arguments["residual"] = self._read(tail.residual, tail.last)
            arguments["residual_scale"], added = added_range.scale / known.scale, added_range.zero
        arguments["numbers"] = [self._range(source).zero, end["zero"], end["low"], end["high"], added]
        arguments["table"] = end["table"]
        for name, value in (("bias", bias), ("scale", scale)):
            arguments[name] = self._constant(tail.last, name, value)
        new = self._layer(node, tail.last, nodes, quantised, arguments, shape)
        if tail.activation == "none" and "to_float" in new.kwargs:
            self._plain_sums.append(new)
        self._counts["layers"] += 1
        self._counts["weights"] += quantised.numel()
        self._counts["zeros"] += int((quantised == 0).sum())
        return True

    def _layer(
        self,
        node: fx.Node,
        last: fx.Node,
        nodes: Sequence[fx.Node],
        weight: Tensor,
        arguments: dict[str, Any],
        shape: tuple[int, ...],
    ) -> fx.Node:
        """The node of the operator that fits."""
        one_pixel = tuple(shape[2:]) in ((), (1, 1)) and weight[0].numel() == weight.shape[1]
        geometry = node_geometry(node, weight) if len(shape) == 4 else None
        if geometry is None or (one_pixel and geometry.groups == 1 and geometry.padding == (0, 0)):
            arguments["weight"] = self._constant(last, "weight", weight.flatten(1).contiguous())
            return self._write(nodes, OPS.int8_linear, **arguments, to_float=False)
        stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
        arguments |= {"stride": stride, "padding": padding, "dilation": dilation}
        if geometry.groups == geometry.in_channels == geometry.out_channels:
            arguments["weight"] = self._constant(last, "weight", weight)
            return self._write(nodes, OPS.int8_depthwise_conv2d, **arguments)
        for name, value in zip(("values", "columns", "rows"), compress_bytes(weight, geometry.groups), strict=True):
            arguments[name] = self._constant(last, name, value)
        sizes = {"in_channels": geometry.in_channels, "kernel_size": list(geometry.kernel_size), "to_float": False}
        return self._write(nodes, OPS.int8_conv2d, **arguments, **sizes)

    # --- layers without weights: only where bytes come in ---

    def _is_bytes(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self._bytes

    def _ends_here(self, node: fx.Node) -> bool:
        """Whether its value can be bytes, and what it changes in place is read by nobody else."""
        if not self._settled(node) or (is_in_place(node) and not sole_name(node.args[0], node)):
            return False
        return all(map(math.isfinite, self._seen.ends[node]))

    def pool(self, node: fx.Node) -> bool:
        """A max pool, which keeps the range."""
        source: Any = node.args[0]
        size = pair(argument(node, "kernel_size"))
        stride, padding = pair(argument(node, "stride") or size), pair(argument(node, "padding"))
        plain = pair(argument(node, "dilation")) == (1, 1) and not argument(node, "ceil_mode")
        if not plain or not self._is_bytes(source) or not self._ends_here(node):
            return False
        self._ranges[node] = self._range(source)
        numbers = {"kernel_size": list(size), "stride": list(stride), "padding": list(padding)}
        self._write([node], OPS.int8_max_pool2d, x=self._bytes[source], **numbers)
        return self._counted()

    def mean(self, node: fx.Node) -> bool:
        """The mean over the pixels."""
        source: Any = node.args[0]
        if not self._is_bytes(source) or not self._ends_here(node) or len(self._seen.shapes[source]) != 4:
            return False
        if node.target == ATEN.adaptive_avg_pool2d.default:
            if list(argument(node, "output_size")) != [1, 1]:
                return False
        elif sorted(d % 4 for d in argument(node, "dim")) != [2, 3] or argument(node, "dtype") is not None:
            return False
        known, from_ = self._range(node), self._range(source)
        scale, numbers = _float32(from_.scale / known.scale), [from_.zero, known.zero, 0, 255, 0]
        self._write([node], OPS.int8_mean, x=self._bytes[source], table=None, scale=scale, numbers=numbers)
        return self._counted()

    def view(self, node: fx.Node) -> bool:
        """Features of one pixel, with or without the pixel's dimensions: the same bytes."""
        source: Any = node.args[0]
        if not self._is_bytes(source) or not self._ends_here(node):
            return False
        if {*self._seen.shapes[source][2:], *self._seen.shapes[node][2:]} != {1}:
            return False
        if self._seen.shapes[source][:2] != self._seen.shapes[node][:2]:
            return False
        self._ranges[node], self._bytes[node] = self._range(source), self._bytes[source]
        self._gone.append(node)
        return True

    def sum(self, node: fx.Node) -> bool:
        """The sum of two images, with the activation behind it."""
        a, b = node.args[:2]
        if not (self._is_bytes(a) and self._is_bytes(b)) or a is b or argument(node, "alpha") != 1:
            return False
        if self._seen.shapes[a] != self._seen.shapes[b]:  # type: ignore[index]
            return False
        return self._map(node, a, b)

    def activation(self, node: fx.Node) -> bool:
        """An activation of its own."""
        source: Any = node.args[0]
        return self._is_bytes(source) and len(self._seen.shapes[source]) == 4 and self._map(node, source, None)

    def _map(self, node: fx.Node, source: Any, other: Any) -> bool:
        nodes = [node]
        users = list(node.users)
        if other is not None and len(users) == 1 and _activation(users[0]) and users[0] in self._seen.shapes:
            nodes.append(users[0])
        if not all(self._ends_here(one) or one is not nodes[-1] for one in nodes):
            return False
        if is_in_place(node) and not sole_name(node.args[0], node):
            return False
        last = nodes[-1]
        name = _activation(last) or "none"
        before = source if last is node else node
        known, end = self._finish(before, last, name)
        if other is None and end["table"] is not None:
            known = self._range(source)
        from_, residual, added = self._range(source), None, 0
        arguments: dict[str, Any] = {"residual_scale": 0.0}
        if other is not None:
            residual, added = self._bytes[other], self._range(other).zero
            arguments["residual_scale"] = _float32(self._range(other).scale / known.scale)
        arguments["numbers"] = [from_.zero, end["zero"], end["low"], end["high"], added]
        scale = _float32(from_.scale / known.scale)
        self._write(
            nodes, OPS.int8_add, x=self._bytes[source], residual=residual, table=end["table"], scale=scale, **arguments
        )
        return self._counted()

    def product(self, node: fx.Node) -> bool:
        """An image times a gate per channel."""
        x, gate = node.args[:2]
        if not (self._is_bytes(x) and self._is_bytes(gate)) or not self._ends_here(node):
            return False
        shapes = self._seen.shapes
        if shapes[x][2:] == (1, 1):  # type: ignore[index]
            x, gate = gate, x
        if len(shapes[x]) != 4 or shapes[gate] != (*shapes[x][:2], 1, 1):  # type: ignore[index]
            return False
        ranges = [self._range(one) for one in (x, gate, node)]  # type: ignore[arg-type]
        scale = _float32(ranges[0].scale * ranges[1].scale / ranges[2].scale)
        numbers = [ranges[0].zero, ranges[2].zero, 0, 255, ranges[1].zero]
        both = {"x": self._bytes[x], "gates": self._bytes[gate]}  # type: ignore[index]
        self._write([node], OPS.int8_mul, **both, table=None, scale=scale, numbers=numbers)
        return self._counted()

    def _counted(self) -> bool:
        self._counts["others"] += 1
        return True


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """What was fused behind a layer, in order."""
    nodes = [first]
    while nodes[-1] is not last:
        nodes.append(next(iter(nodes[-1].users)))
    return nodes


_WEIGHTED = (ATEN.conv2d.default, ATEN.linear.default)
_LOWER_ACTIVATION = _Lowering.activation
_LOWER: dict[Any, Callable[[_Lowering, fx.Node], bool]] = {
    **dict.fromkeys(_WEIGHTED, _Lowering.weighted),
    **dict.fromkeys(_VIEWS, _Lowering.view),
    **dict.fromkeys(_ADDS, _Lowering.sum),
    ATEN.max_pool2d.default: _Lowering.pool,
    ATEN.mean.dim: _Lowering.mean,
    ATEN.adaptive_avg_pool2d.default: _Lowering.mean,
    ATEN.mul.Tensor: _Lowering.product,
}
