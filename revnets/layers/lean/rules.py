"""What the nodes of autograd's graph say of how their results came about: rules for ``reading``."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from . import recipes
from .keeper import itself
from .kinds import Kind, kind_of
from .nodes import Kept, Node

aten = torch.ops.aten


class Graph(Protocol):
    """What rules ask who reads the graph (``reading.Reader``)."""

    def input(self, edge: tuple[Any, int], depth: int) -> Node | Kept | None:
        """What goes into a node of autograd's; None where nothing is known of it."""

    def epsilons(self, weight: Node | Kept | None) -> tuple[float, ...]:
        """Of the norms that have this weight, as far as they are known."""

    def follow(self, node: Node, function: Any, kind: Kind, again: Any, args: list[Any], kwargs: Any = None) -> None:
        """Give a node its recipe: ``again(*args)``, as ``kind`` computed it."""


Rule = Callable[[Graph, Any, Node, int], None]
"""Gives a node its recipe, from what autograd's node has; leaves it alone where that does not say enough."""


def lies_like(copy: Node, source: Node) -> None:
    """A copy of a dense tensor is that tensor, computed again, if it lies in memory as it does."""
    if source.spec[2] is None:
        source.spec = copy.spec
    elif source.spec != copy.spec:
        copy.again, copy.base = aten.clone.default, None


def shorten(node: Node, index: Tensor, before: torch.Size) -> None:
    """Keep places as short integers: of pooling, which asks to keep the map that they are in right before."""
    dense = len(before) > 2 and recipes.is_dense(index)  # others, such as expanded ones, take less as they are
    short = recipes.shorter(index, prod(before[-2:])) if dense else None
    if short is not None:
        node.again, node.kind = (lambda bits: bits.to(torch.int64)), _MAX_POOL
        node.follows_from([Kept(short, short._version)])


def look_into(node: Node, view: Tensor, base: Tensor, home: Node) -> None:
    """A view of a tensor that can be computed again is the same view of what comes back."""
    size, stride, lies = view.shape, view.stride(), base.stride()
    offset = view.storage_offset() - base.storage_offset()

    def again(x: Tensor) -> Tensor:
        if x.stride() != lies:
            x = torch.empty_strided(x.shape, lies, dtype=x.dtype, device=x.device).copy_(x)
        return x.as_strided(size, stride, x.storage_offset() + offset)

    node.again, node.base = again, home.base or home
    node.follows_from([home])


# --- rules -----------------------------------------------------------------------------------------------------------


def _unary(op: Any, *numbers: str, named: tuple[str, ...] = ()) -> Rule:
    """Of an operator of one tensor, and of numbers that its node has."""
    kind = kind_of(op)

    def rule(reader: Graph, function: Any, node: Node, depth: int) -> None:
        x = reader.input(function.next_functions[0], depth)
        if x is not None:
            args = [x, *(_number(function, name) for name in numbers)]
            reader.follow(node, function, kind, op, args, {name: _number(function, name) for name in named})

    return rule


def _view(name: str, *numbers: str) -> Rule:
    """Of a view: a step on the way to others. Those that are asked for lie in their base's memory (``look_into``)."""

    def rule(reader: Graph, function: Any, node: Node, depth: int) -> None:
        source = reader.input(function.next_functions[0], depth)
        if type(source) is not Node or (source.again is None and source.tensor is None):
            return
        shape, dtype = torch.Size(function._input_metadata[0].shape), function._input_metadata[0].dtype
        args = [_number(function, number) for number in numbers] or [shape]  # which says all where there are none
        node.spec, node.nbytes = (dtype, shape, None), prod(shape) * dtype.itemsize
        node.again, node.base = (lambda x: getattr(x, name)(*args)), source.base or source
        node.follows_from([source])

    return rule


def _batch_norm(reader: Graph, function: Any, node: Node, depth: int) -> None:
    if not function._saved_training:
        return
    inputs = [reader.input(edge, depth) for edge in function.next_functions]
    statistics = [_held(function._raw_saved_result1), _held(function._raw_saved_result2)]
    if len(inputs) == 3 and None not in inputs and all(type(one) is Kept for one in statistics):
        reader.follow(node, function, _BATCH_NORM, recipes.batch_norm, [*inputs, *statistics])


def _of_rows(op: Any, *numbers: str) -> Rule:
    """Of a norm of rows: its epsilon is not in the graph, but known by its weight."""
    kind, again = kind_of(op), recipes.NORMS_OF_ROWS[op]

    def rule(reader: Graph, function: Any, node: Node, depth: int) -> None:
        x, edges = _held(function._raw_saved_input), function.next_functions[1:3]
        statistics = [_held(function._raw_saved_result1), _held(function._raw_saved_result2)]
        factors = [reader.input(edge, depth) for edge in edges]
        absent = [factor is None and edge[0] is not None for factor, edge in zip(factors, edges, strict=True)]
        if x is not None and None not in statistics and not any(absent):
            eps = reader.epsilons(factors[0])
            if factors[0] is not None and not eps:  # from the statistics alone, the last bits would be others
                return
            args = [x, *factors, *statistics, eps, *(_number(function, name) for name in numbers)]
            reader.follow(node, function, kind, again, args)

    return rule


def _sum(reader: Graph, function: Any, node: Node, depth: int) -> None:
    first, second = (reader.input(edge, depth) for edge in function.next_functions)
    if first is not None and second is not None and function._saved_alpha == 1:
        reader.follow(node, function, _ADD, aten.add.Tensor, [first, second])


def _product(reader: Graph, function: Any, node: Node, depth: int) -> None:
    edges = function.next_functions
    first = _held(function._raw_saved_self) or reader.input(edges[0], depth)
    second = _held(function._raw_saved_other) or reader.input(edges[1], depth)
    if first is not None and second is not None:
        reader.follow(node, function, _MUL, aten.mul.Tensor, [first, second])


def _held(saved: Any) -> Node | Kept | None:
    """What autograd keeps, such as a small factor; None where it keeps nothing, or others decide how."""
    try:
        found = saved.data
    except RuntimeError:
        return None
    return found if type(found) is Kept or type(found) is Node else None


def _copy(reader: Graph, function: Any, node: Node, depth: int) -> None:
    source = reader.input(function.next_functions[0], depth)
    if type(source) is not Node:
        return
    if source.base is not None and source.again is not None:  # of a view: it lies otherwise
        reader.follow(node, function, _CLONE, _contiguous, [source])
        return
    reader.follow(node, function, _CLONE, aten.clone.default if source.again is None else itself, [source])
    if source.again is not None:
        node.base = source.base or source


def _padding(reader: Graph, function: Any, node: Node, depth: int) -> None:
    """Of no elements is a copy; what others hold is not in the graph."""
    if not any(function._saved_pad):
        _copy(reader, function, node, depth)


def _contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _number(function: Any, name: str) -> Any:
    """What a node of autograd's has, by name."""
    found = getattr(function, f"_saved_{name}")
    if isinstance(found, tuple):
        return tuple(map(_signed, found))
    return _signed(found) if type(found) is int else found


def _signed(number: int) -> int:
    """An integer of a node of autograd's, which shows -1 as 2**64 - 1."""
    return number - 2**64 if number >= 2**63 else number


def _cat(reader: Graph, function: Any, node: Node, depth: int) -> None:
    inputs = [reader.input(edge, depth) for edge in function.next_functions]
    if None not in inputs:
        reader.follow(node, function, _CAT, aten.cat.default, [inputs, _signed(function._saved_dim)])


def _nearest(reader: Graph, function: Any, node: Node, depth: int) -> None:
    x = reader.input(function.next_functions[0], depth)
    if x is not None:
        numbers = function._saved_output_size, function._saved_scales_h, function._saved_scales_w
        reader.follow(node, function, _NEAREST, aten.upsample_nearest2d.default, [x, *numbers])


def _max_pool(reader: Graph, function: Any, node: Node, depth: int) -> None:
    x, places = _held(function._raw_saved_self), _held(function._raw_saved_result1)
    if x is not None and type(places) is Node:
        reader.follow(node, function, _MAX_POOL, recipes.picked, [x, places])


_BATCH_NORM, _ADD, _MUL, _CLONE, _CAT, _NEAREST, _MAX_POOL = map(
    kind_of,
    (
        aten.native_batch_norm.default,
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.clone.default,
        aten.cat.default,
        aten.upsample_nearest2d.default,
        aten.max_pool2d_with_indices.default,
    ),
)

RULES: dict[str, Rule] = {
    "ReluBackward0": _unary(aten.relu.default),
    "SiluBackward0": _unary(aten.silu.default),
    "HardswishBackward0": _unary(aten.hardswish.default),
    "HardsigmoidBackward0": _unary(aten.hardsigmoid.default),
    "SigmoidBackward0": _unary(aten.sigmoid.default),
    "TanhBackward0": _unary(aten.tanh.default),
    "MishBackward0": _unary(aten.mish.default),
    "GeluBackward0": _unary(aten.gelu.default, named=("approximate",)),
    "LeakyReluBackward0": _unary(aten.leaky_relu.default, "negative_slope"),
    "HardtanhBackward0": _unary(aten.hardtanh.default, "min_val", "max_val"),
    "NativeBatchNormBackward0": _batch_norm,
    "NativeLayerNormBackward0": _of_rows(aten.native_layer_norm.default, "normalized_shape"),
    "NativeGroupNormBackward0": _of_rows(aten.native_group_norm.default, "N", "C", "HxW", "group"),
    "AddBackward0": _sum,
    "MulBackward0": _product,
    "CloneBackward0": _copy,
    "ConstantPadNdBackward0": _padding,
    "ViewBackward0": _view("reshape"),
    "UnsafeViewBackward0": _view("reshape"),
    "PermuteBackward0": _view("permute", "dims"),
    "TransposeBackward0": _view("transpose", "dim0", "dim1"),
    "RollBackward0": _unary(aten.roll.default, "shifts", "dims"),
    "CatBackward0": _cat,
    "UpsampleNearest2DBackward0": _nearest,
    "MaxPool2DWithIndicesBackward0": _max_pool,
}
"""By the names of torch's own nodes; those of its users' functions have no number at their end."""
