"""Recipes from autograd's graph, which says how a tensor that it asks to keep came about: no operator is looked at.

Of norms, activations, sums, products and copies the graph has all that their values depend on: the operator, its
inputs and its numbers. Where one is missing (the epsilon of a LayerNorm, a number that was added) there is no recipe.
To see every operator costs more: Python takes part in each of them, between kernels that have filled the caches.

What the graph does not show is a tensor that is written to without gradient (``h.detach().mul_(2)``): versions tell of
some of these, and networks that are seen to do so in a trial (``Writes``) are left to the recorder. Where such writes
begin after the trial, what is computed again is not what there was, and the step ends with a sentence (``witness``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import recipes
from .keeper import Keeper, itself
from .kinds import Kind, kind_of
from .nodes import Kept, Memory, Node, spec_of
from .share import Plan

aten = torch.ops.aten

FURTHEST = 32
"""Operators in a row that are read for one tensor."""

AVAILABLE = hasattr(torch._C._autograd.SavedTensor, "data") and hasattr(torch._C._autograd, "_InputMetadata")
"""Whether this torch shows what its graph keeps."""


class Reader(Keeper):
    """Within its ``active()``, autograd keeps of what is cheap to compute again only how to, by its own graph.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.BatchNorm2d(64), torch.nn.SiLU())
        >>> x = torch.randn(1, 3, 32, 32)
        >>> with Reader(net.parameters()).active() as reader:
        ...     y = net(x)
        >>> reader.asked - reader.kept == y.nbytes  # what SiLU needs follows from what the norm needs
        True
    """

    def __init__(self, persistent: Iterable[Tensor] = (), plan: Plan | None = None, to_the_end: bool = False) -> None:
        super().__init__(persistent, plan, to_the_end)
        self._values: dict[tuple[Any, int], Node] = {}
        self._before = torch.Size()

    def _forget_all(self) -> None:
        super()._forget_all()
        self._values.clear()

    def _node_of(self, tensor: Tensor, storage: torch.UntypedStorage) -> Node:
        function, memory = tensor.grad_fn, self._memory_of(storage)
        before, self._before = self._before, tensor.shape
        if function is None:
            node = self._unread(tensor, memory)
            if tensor.dtype is torch.int64:
                _shorten(node, tensor, before)
            return node
        node = self._value(function, tensor.output_nr, 0)
        if node.storage is None:  # it was on the way to others only, so far
            if node.again is not None and tensor._version > node.writes:
                return self._unread(tensor, memory)
            node.version, node.storage, node.spec, node.nbytes = tensor._version, memory, spec_of(tensor), tensor.nbytes
            if node.again is itself:
                _lies_like(node, node.sources[0])
        elif node.version != tensor._version:
            return self._unread(tensor, memory)
        return node

    def _unread(self, tensor: Tensor, memory: Memory) -> Node:
        """A node without a recipe."""
        node = Node(spec_of(tensor), tensor.nbytes, tensor._version)
        node.storage, node.ledger = memory, self._ledger
        return node

    def _value(self, function: Any, place: int, depth: int) -> Node:
        """The node of a result of a node of autograd's."""
        node = self._values.get((function, place))
        if node is None:
            node = self._values[function, place] = Node((), 0, -1)
            node.ledger = self._ledger
            rule = _RULES.get(type(function).__name__)
            if rule is not None and depth < FURTHEST:
                rule(self, function, node, depth + 1)
        return node

    # --- what rules are made of ------------------------------------------------------------------------------------

    def input(self, edge: tuple[Any, int], depth: int) -> Node | Kept | None:
        """What goes into a node of autograd's; None where nothing is known of it."""
        function, place = edge
        if function is None:
            return None
        if type(function).__name__ == "AccumulateGrad":
            leaf = function.variable
            return Kept(leaf, leaf._version) if id(leaf) in self._stay else None
        return self._value(function, place, depth)

    def follow(self, node: Node, function: Any, kind: Kind, again: Any, args: list[Any], kwargs: Any = None) -> None:
        """Give a node its recipe: ``again(*args)``, as ``kind`` computed it."""
        found = function._input_metadata[0]
        shape = torch.Size(found.shape)
        node.spec, node.nbytes = (found.dtype, shape, None), prod(shape) * found.dtype.itemsize
        node.again, node.kind, node.inplace = again, kind, kind.inplace
        node.follows_from(args, kwargs)
        if kind.inplace is not None:  # it may have been written to its first input
            first = args[0]
            node.writes = 1 + (0 if type(first) is Kept else max(first.version, first.writes))


Rule = Callable[[Reader, Any, Node, int], None]


def _lies_like(copy: Node, source: Node) -> None:
    """A copy of a dense tensor is that tensor, computed again, if it lies in memory as it does."""
    if source.spec[2] is None:
        source.spec = copy.spec
    elif source.spec != copy.spec:
        copy.again, copy.base = aten.clone.default, None


def _shorten(node: Node, index: Tensor, before: torch.Size) -> None:
    """Keep places as short integers: of pooling, which asks to keep the map that they are in right before."""
    short = recipes.shorter(index, prod(before[-2:])) if len(before) > 2 else None
    if short is not None:
        node.again, node.kind = (lambda bits: bits.to(torch.int64)), _MAX_POOL
        node.follows_from([Kept(short, short._version)])


def _unary(op: Any, *numbers: str, named: tuple[str, ...] = ()) -> Rule:
    """Of an operator of one tensor, and of numbers that its node has."""
    kind = kind_of(op)

    def rule(reader: Reader, function: Any, node: Node, depth: int) -> None:
        x = reader.input(function.next_functions[0], depth)
        if x is not None:
            args = [x, *(getattr(function, f"_saved_{name}") for name in numbers)]
            reader.follow(node, function, kind, op, args, {n: getattr(function, f"_saved_{n}") for n in named})

    return rule


def _batch_norm(reader: Reader, function: Any, node: Node, depth: int) -> None:
    if not function._saved_training:
        return
    inputs = [reader.input(edge, depth) for edge in function.next_functions]
    statistics = [_held(function._raw_saved_result1), _held(function._raw_saved_result2)]
    if len(inputs) == 3 and None not in inputs and all(type(one) is Kept for one in statistics):
        reader.follow(node, function, _BATCH_NORM, recipes.batch_norm, [*inputs, *statistics])


def _sum(reader: Reader, function: Any, node: Node, depth: int) -> None:
    first, second = (reader.input(edge, depth) for edge in function.next_functions)
    if first is not None and second is not None and function._saved_alpha == 1:
        reader.follow(node, function, _ADD, aten.add.Tensor, [first, second])


def _product(reader: Reader, function: Any, node: Node, depth: int) -> None:
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


def _copy(reader: Reader, function: Any, node: Node, depth: int) -> None:
    source = reader.input(function.next_functions[0], depth)
    if type(source) is not Node:
        return
    reader.follow(node, function, _CLONE, aten.clone.default if source.again is None else itself, [source])
    if source.again is not None:
        node.base = source.base or source


def _signed(number: int) -> int:
    """An integer of a node of autograd's, which shows -1 as 2**64 - 1."""
    return number - 2**64 if number >= 2**63 else number


def _cat(reader: Reader, function: Any, node: Node, depth: int) -> None:
    inputs = [reader.input(edge, depth) for edge in function.next_functions]
    if None not in inputs:
        reader.follow(node, function, _CAT, aten.cat.default, [inputs, _signed(function._saved_dim)])


def _nearest(reader: Reader, function: Any, node: Node, depth: int) -> None:
    x = reader.input(function.next_functions[0], depth)
    if x is not None:
        numbers = function._saved_output_size, function._saved_scales_h, function._saved_scales_w
        reader.follow(node, function, _NEAREST, aten.upsample_nearest2d.default, [x, *numbers])


def _max_pool(reader: Reader, function: Any, node: Node, depth: int) -> None:
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

_RULES: dict[str, Rule] = {
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
    "AddBackward0": _sum,
    "MulBackward0": _product,
    "CloneBackward0": _copy,
    "CatBackward0": _cat,
    "UpsampleNearest2DBackward0": _nearest,
    "MaxPool2DWithIndicesBackward0": _max_pool,
}
"""By the names of torch's own nodes; those of its users' functions have no number at their end."""


class Writes(TorchDispatchMode):
    """Notes whether a network writes to results that have a gradient where autograd does not see it.

    Attributes:
        hidden: whether it did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = False
        self._results: dict[int, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args, kwargs))
        for place in recipes.writes(func):
            written = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
            for one in _tensors(written):
                if not (seen and one.requires_grad):
                    self.hidden |= any(t.requires_grad for t in self._results.get(_address(one), ()))
        out = func(*args, **kwargs)
        for one in _tensors(out):  # whether they have a gradient is known later
            self._results.setdefault(_address(one), []).append(one)
        return out


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
