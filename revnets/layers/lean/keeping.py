"""Recipes from the operators themselves: a dispatch mode sees each of them.

While a network runs, it notes of every cheap operator (norm, activation, sum, copy, see ``recipes``) how its result
came about. A recipe is found by where a tensor lies in memory: its storage, shape and strides, and its version.
Whatever is written in place ends what was known of that memory; a tensor of which nothing is known is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import recipes
from .keeper import SMALL, Keeper, is_plain, itself
from .kinds import KINDS, Kind, kind_of
from .nodes import Kept, Node, mapped, spec_of


class Recorder(Keeper, TorchDispatchMode):
    """Within this context, autograd keeps of what is cheap to compute again only how to.

    Example:
        >>> x, weight = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)
        >>> with Recorder().active() as recorder:
        ...     y = torch.nn.functional.gelu(x @ weight) @ weight
        >>> recorder.kept == 2 * x.nbytes + weight.nbytes  # the input and the first product, not what gelu made of it
        True
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts stay compiled inside; what they give is kept."""
        return True

    def _watching(self) -> AbstractContextManager[Any]:
        return self

    def _node_of(self, tensor: Tensor, storage: torch.UntypedStorage) -> Node:
        return self._find(tensor, storage) or self._new(tensor, tensor._version, storage)

    # --- what operators do -----------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(func) or kind_of(func)
        kwargs = kwargs or {}
        if kind.nothing or self._done or self._busy:
            return func(*args, **kwargs)
        former: Any = None
        source: Node | None = None
        if kind.batch_norm:
            former = [self._node(a) for a in args[:3]], {}
        elif kind.view:
            source = self._known(args[0]) if isinstance(args[0], Tensor) else None
        elif kind.again is not None and _is_large(args):
            former = [mapped(self._node, a) for a in args], {name: mapped(self._node, a) for name, a in kwargs.items()}
        out = func(*args, **kwargs)
        for place in kind.writes:
            self._forget(kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None)
        if former is not None:
            self._note(func, kind, former, args, out)
        elif source is not None:
            self._note_view(func, source, args, kwargs, out)
        elif kind.code is not None and torch.is_grad_enabled():
            self._note_code(kind, args, kwargs, out)
        return out

    def _note(self, func: Any, kind: Kind, inputs: Any, given: Any, out: Any) -> None:
        """Remember how an operator's (first) result came about."""
        result = out if isinstance(out, Tensor) else out[0]
        if not is_plain(result) or result.nbytes < SMALL or (kind.moves and _is_of_model(inputs)):
            return
        storage = result.untyped_storage()
        memory = self._memory.get(storage._cdata)
        if memory is not None and memory.nodes:  # a view of an argument, by an operator that does not say so
            return
        node = self._new(result, result._version + bool(kind.writes), storage)
        node.again, node.inplace, node.kind = kind.again, kind.inplace, kind
        first = inputs[0][0]
        if kind.batch_norm:
            node.again, inputs = _batch_norm(func, inputs[0], given, out)
        elif kind.copies and type(first) is Node and first.again is not None and first.spec == node.spec:
            node.again, node.base = itself, first.base or first
        node.follows_from(*inputs)

    def _note_view(self, func: Any, source: Node, args: Any, kwargs: Any, out: Any) -> None:
        several = isinstance(out, (list, tuple))
        for place, view in enumerate(out if several else [out]):
            if not is_plain(view):
                continue
            storage = view.untyped_storage()
            if storage._cdata != args[0].untyped_storage()._cdata:
                continue
            node = self._new(view, args[0]._version, storage)  # which it will share
            node.again = _view_of(func, place if several else None)
            node.base = source.base or source
            node.follows_from([source, *args[1:]], kwargs)

    def _note_code(self, kind: Kind, args: Any, kwargs: Any, out: Any) -> None:
        """Remember a result by a few bits per element."""
        code: Any = kind.code
        result = out if isinstance(out, Tensor) else out[code.result]
        if not is_plain(result) or result.nbytes < SMALL or not code.fits(*args, **kwargs):
            return
        node = self._new(result, result._version + bool(kind.writes), result.untyped_storage())
        short = code.encode(result, *args)
        spec = node.spec
        node.again, node.kind = (lambda bits: code.decode(bits, *spec)), kind
        node.follows_from([Kept(short, short._version)])
        if code.other is not None:
            self._note_other(code.other, kind, args[0], node, out[1 - code.result])

    def _note_other(self, again: Callable[..., Tensor], kind: Kind, source: Any, coded: Node, other: Any) -> None:
        """Remember the second result of an operator, which follows from its argument and the coded one."""
        inputs = [self._node(source), coded]
        node = self._new(other, other._version, other.untyped_storage())
        node.again, node.kind = again, kind
        node.follows_from(inputs)

    # --- what is known of memory -----------------------------------------------------------------------------------

    def _new(self, tensor: Tensor, version: int, storage: torch.UntypedStorage) -> Node:
        spec, memory = spec_of(tensor), self._memory_of(storage)
        node = Node(spec, tensor.nbytes, version)
        node.storage, node.ledger = memory, self._ledger
        if storage._cdata in self._persistent:
            node.persistent = True
        memory.nodes[(*spec, tensor.storage_offset())] = node
        return node

    def _find(self, tensor: Tensor, storage: torch.UntypedStorage) -> Node | None:
        memory = self._memory.get(storage._cdata)
        if memory is None or not memory.nodes:
            return None
        node = memory.nodes.get((*spec_of(tensor), tensor.storage_offset()))
        return node if node is not None and node.version == tensor._version else None

    def _known(self, tensor: Tensor) -> Node | None:
        """The node of a tensor that can be computed again."""
        if not is_plain(tensor):
            return None
        node = self._find(tensor, tensor.untyped_storage())
        return node if node is not None and node.again is not None else None

    def _node(self, value: Any) -> Any:
        """The node of a tensor, or the tensor if it stays anyway; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if type(value) is not Tensor and isinstance(value, nn.Parameter):  # of a trace, too, whose type is FakeTensor
            return Kept(value, value._version)
        if not is_plain(value):
            return Node((), 0, 0)  # of which nothing can be known
        storage = value.untyped_storage()
        node = self._find(value, storage)
        if node is None:
            if value.nbytes < SMALL:
                return Kept(value.clone(), 0)  # whoever else has it may let it go, or change it
            node = self._new(value, value._version, storage)
            node.alive = ref(value)
        return node

    def _forget(self, written: Any) -> None:
        """Nothing is known any more of what was written to."""
        if isinstance(written, (list, tuple)):
            for one in written:
                self._forget(one)
        elif isinstance(written, Tensor) and id(written) not in self._stay and is_plain(written):
            memory = self._memory.get(written.untyped_storage()._cdata)
            if memory is not None:
                memory.nodes.clear()


def _is_of_model(inputs: Any) -> bool:
    """Autocast's copies of weights are kept: the weights may change before the backward pass, their copies not."""
    first = inputs[0][0] if inputs[0] else None
    if isinstance(first, Kept):
        return isinstance(first.tensor, nn.Parameter)
    return isinstance(first, Node) and first.persistent


def _is_large(args: Any) -> bool:
    first = args[0] if args else None
    return not isinstance(first, Tensor) or first.nbytes >= SMALL


def _batch_norm(func: Any, args: Any, given: Any, out: Any) -> tuple[Callable[..., Tensor], Any]:
    """How to run a batch norm again: with the statistics that it had, which move without a new version."""
    if not recipes.normalises_by_batch(func, given):
        return _first_of(func), ([*args, *(t if t is None else t.clone() for t in given[3:5]), *given[5:]], {})
    return recipes.batch_norm, ([*args, *(Kept(tensor, tensor._version) for tensor in out[1:3])], {})


def _first_of(func: Any) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: func(*args, **kwargs)[0]


def _view_of(func: Any, place: int | None) -> Callable[..., Tensor]:
    return func if place is None else lambda *args, **kwargs: func(*args, **kwargs)[place]
