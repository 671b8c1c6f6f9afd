"""Recipes from autograd's graph, which says how a tensor that it asks to keep came about: no operator is looked at.

Of norms, activations, sums, products, copies and views the graph has all that their values depend on (``rules``): the
operator, its inputs and its numbers. Where one is missing (a number that was added) there is no recipe; the epsilon of
a LayerNorm is looked up by its weight, and what comes of it compared with the statistics that the graph has.
To see every operator costs more: Python takes part in each of them, between kernels that have filled the caches.

What the graph does not show is a tensor that is written to without gradient (``h.detach().mul_(2)``): versions tell of
some of these, and networks that are seen to do so in a trial (``Writes``) are left to the recorder. Where such writes
begin after the trial, what is computed again is not what there was, and the step ends with a sentence (``witness``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import recipes
from .keeper import Keeper, is_plain, itself
from .kinds import Kind
from .nodes import Kept, Memory, Node, spec_of
from .rules import RULES, lies_like, look_into, shorten
from .share import Plan

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

    def __init__(
        self,
        persistent: Iterable[Tensor] = (),
        plan: Plan | None = None,
        to_the_end: bool = False,
        epsilons: Mapping[int, tuple[float, ...]] | None = None,
    ) -> None:
        super().__init__(persistent, plan, to_the_end)
        self._epsilons = epsilons or {}
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
                shorten(node, tensor, before)
            return node
        node = self._value(function, tensor.output_nr, 0)
        if node.storage is None:  # it was on the way to others only, so far
            if tensor._base is not None:
                self._look(node, tensor, tensor._base, storage)
            if node.again is not None and tensor._version > node.writes:
                return self._unread(tensor, memory)
            node.version, node.storage, node.spec, node.nbytes = tensor._version, memory, spec_of(tensor), tensor.nbytes
            if node.again is itself:
                lies_like(node, node.sources[0])
        elif node.version != tensor._version:
            return self._unread(tensor, memory)
        return node

    def _look(self, node: Node, view: Tensor, base: Tensor, storage: torch.UntypedStorage) -> None:
        """How a view comes back: with its base, or not at all."""
        home = self._node_of(base, storage) if is_plain(base) else None
        self._before = view.shape
        if home is None or home.again is None:
            node.again = node.base = None
        else:
            node.writes = home.writes
            look_into(node, view, base, home)

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
            rule = RULES.get(type(function).__name__)
            if rule is not None and place == 0 and depth < FURTHEST:  # further results are statistics
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

    def epsilons(self, weight: Node | Kept | None) -> tuple[float, ...]:
        """Of the norms that have this weight, as far as they are known."""
        return self._epsilons.get(id(weight.tensor), ()) if type(weight) is Kept else ()

    def follow(self, node: Node, function: Any, kind: Kind, again: Any, args: list[Any], kwargs: Any = None) -> None:
        """Give a node its recipe: ``again(*args)``, as ``kind`` computed it."""
        first = args[0]
        if kind.keeps_shape and type(first) is Node and first.spec:  # as its metadata says, which takes longer to ask
            node.spec, node.nbytes = (*first.spec[:2], None), first.nbytes
        else:
            found = function._input_metadata[0]
            shape = torch.Size(found.shape)
            node.spec, node.nbytes = (found.dtype, shape, None), prod(shape) * found.dtype.itemsize
        node.again, node.kind, node.inplace = again, kind, kind.inplace
        node.follows_from(args, kwargs)
        if kind.inplace is not None:  # it may have been written to its first input
            node.writes = 1 + (0 if type(first) is Kept else max(first.version, first.writes))


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
