"""What a training step keeps for its backward pass: of what is cheap to compute again, only how to.

While a network runs, a dispatch mode (``Recorder``) notes of every cheap operator (norm, activation, sum, copy, see
``recipes``) how its result came about, and autograd's hooks for saved tensors ask it what to keep. A tensor whose
recipe needs only what is kept anyway is not kept: the backward pass computes it again when it is asked for, once, and
lets it go with the last node that holds it. So the saved values are the same, and every gradient is computed by torch's
own kernels.

A recipe is found by where a tensor lies in memory: its storage, shape and strides, and its version. Whatever is written
in place ends what was known of that memory; a tensor of which nothing is known is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from . import recipes
from .nodes import DEEPEST, Kept, Memory, Node, closure, mapped, sources, spec_of

SMALL = 1024
"""Bytes of a tensor that is not worth a recipe."""
LONGEST = 4
"""Tensors of its own size that may come back with one: sums of a stage of a network need all sums before them."""


_TYPES = frozenset((Tensor, nn.Parameter, torch._subclasses.fake_tensor.FakeTensor))


def _is_plain(tensor: Any) -> bool:
    """Whether its place in memory and its version say all about its values."""
    return (
        type(tensor) in _TYPES
        and tensor.layout is torch.strided
        and not (tensor.dtype.is_complex or tensor.is_neg() or tensor.is_inference())
    )


class Recorder(TorchDispatchMode):
    """Within this context, autograd keeps of what is cheap to compute again only how to.

    Args:
        persistent: tensors that stay anyway: parameters and buffers.

    Attributes:
        kept: bytes held for the backward pass, each storage once; persistent ones are not counted.
        asked: bytes that autograd asked to hold.

    Example:
        >>> x, weight = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)
        >>> with Recorder().active() as recorder:
        ...     y = torch.nn.functional.gelu(x @ weight) @ weight
        >>> recorder.kept == 2 * x.nbytes + weight.nbytes  # the input and the first product, not what gelu made of it
        True
    """

    def __init__(self, persistent: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.kept = self.asked = 0
        self._persistent = {tensor.untyped_storage()._cdata for tensor in persistent if _is_plain(tensor)}
        self._memory: dict[int, Memory] = {}
        self._busy = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts stay compiled inside; what they give is kept."""
        return True

    @contextmanager
    def active(self) -> Iterator[Recorder]:
        """Record, and answer autograd."""
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        with self._hooks, self:
            _running.recorders.append(self)
            try:
                yield self
            finally:  # recipes that are needed live with autograd's nodes
                _running.recorders.remove(self)
                for memory in self._memory.values():
                    memory.nodes.clear()
                self._memory.clear()

    # --- what operators do -----------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._busy:
            return func(*args, **kwargs)
        kind = _kind(func)
        if kind.nothing:
            return func(*args, **kwargs)
        former: tuple[list[Any], dict[str, Any]] | None = None
        if kind.batch_norm:
            former = [self._node(a) for a in args[:3]], {}
        elif kind.again is not None and _is_large(args):
            former = [mapped(self._node, a) for a in args], {name: mapped(self._node, a) for name, a in kwargs.items()}
        source = self._known(args[0]) if kind.view and isinstance(args[0], Tensor) else None
        out = func(*args, **kwargs)
        for place in kind.writes:
            for written in tree_leaves(kwargs.get(place) if isinstance(place, str) else args[place : place + 1]):
                if isinstance(written, Tensor):
                    self._forget(written)
        if former is not None:
            self._note(func, kind, former, args, out)
        elif source is not None:
            self._note_view(func, source, args, kwargs, out)
        elif kind.code is not None and torch.is_grad_enabled():
            self._note_code(kind.code, bool(kind.writes), args, kwargs, out)
        return out

    def _note(self, func: Any, kind: _Kind, inputs: Any, given: Any, out: Any) -> None:
        """Remember how an operator's (first) result came about."""
        result = out if isinstance(out, Tensor) else out[0]
        if not _is_plain(result) or result.nbytes < SMALL or _is_cast_of_parameter(func, inputs):
            return
        memory = self._memory.get(result.untyped_storage()._cdata)
        if memory is not None and memory.nodes:  # a view of an argument, by an operator that does not say so
            return
        node = self._new(result, result._version + bool(kind.writes))
        node.again, node.inplace, node.inputs = kind.again, kind.inplace, inputs
        first = inputs[0][0]
        if kind.batch_norm:
            node.again, node.inputs = _batch_norm(func, inputs[0], given, out)
        elif kind.copies and first.again is not None and first.spec == node.spec:
            node.again, node.base = _itself, first.base or first
        self._link(node)

    def _note_view(self, func: Any, source: Node, args: Any, kwargs: Any, out: Any) -> None:
        several = isinstance(out, (list, tuple))
        for place, view in enumerate(out if several else [out]):
            if not _is_plain(view) or view.untyped_storage()._cdata != args[0].untyped_storage()._cdata:
                continue
            node = self._new(view, args[0]._version)  # which it will share
            node.again = _view_of(func, place if several else None)
            node.inputs, node.base = ([source, *args[1:]], kwargs), source.base or source
            self._link(node)

    def _note_code(self, code: recipes.Code, written: bool, args: Any, kwargs: Any, out: Any) -> None:
        """Remember a result by a few bits per element."""
        result = out if isinstance(out, Tensor) else out[code.result]
        if not _is_plain(result) or result.nbytes < SMALL or not code.fits(*args, **kwargs):
            return
        node = self._new(result, result._version + written)
        short = code.encode(result, *args)
        packed = Node(spec_of(short), short.nbytes, short._version)
        packed.hold(short)
        spec = node.spec
        node.again, node.inputs = (lambda bits: code.decode(bits, *spec)), ([packed], {})
        self._link(node)
        if code.other is not None:
            self._note_other(code.other, args[0], node, out[1 - code.result])

    def _note_other(self, again: Callable[..., Tensor], source: Any, coded: Node, other: Any) -> None:
        """Remember the second result of an operator, which follows from its argument and the coded one."""
        inputs = [self._node(source), coded]
        node = self._new(other, other._version)
        node.again, node.inputs = again, (inputs, {})
        self._link(node)

    @staticmethod
    def _link(node: Node) -> None:
        level = 0
        for source in sources(node):
            source.readers += 1
            level = max(level, source.level)
        node.level = level + 1

    # --- what is known of memory -----------------------------------------------------------------------------------

    def _new(self, tensor: Tensor, version: int) -> Node:
        spec = spec_of(tensor)
        key = tensor.untyped_storage()._cdata
        memory = self._memory.get(key)
        if memory is None:
            memory = self._memory[key] = Memory(tensor)
        node = Node(spec, tensor.nbytes, version)
        node.storage = memory
        node.persistent = key in self._persistent
        memory.nodes[(*spec, tensor.storage_offset())] = node
        return node

    def _find(self, tensor: Tensor) -> Node | None:
        memory = self._memory.get(tensor.untyped_storage()._cdata)
        if memory is None:
            return None
        node = memory.nodes.get((*spec_of(tensor), tensor.storage_offset()))
        return node if node is not None and node.version == tensor._version else None

    def _known(self, tensor: Tensor) -> Node | None:
        """The node of a tensor that can be computed again."""
        if not _is_plain(tensor):
            return None
        node = self._find(tensor)
        return node if node is not None and node.again is not None else None

    def _node(self, value: Any) -> Any:
        """The node of a tensor; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if not _is_plain(value):
            return Node((), 0, 0)  # of which nothing can be known
        node = self._find(value)
        if node is None:
            node = self._new(value, value._version)
            if isinstance(value, nn.Parameter):
                node.hold(value)
            elif value.nbytes < SMALL:
                node.version = 0
                node.hold(value.clone())  # whoever else has it may let it go, or change it
            else:
                node.alive = ref(value)
        return node

    def _forget(self, tensor: Tensor) -> None:
        if _is_plain(tensor):
            memory = self._memory.get(tensor.untyped_storage()._cdata)
            if memory is not None:
                memory.nodes.clear()

    # --- what autograd keeps ---------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Any:
        if not _is_plain(tensor):
            return Kept(tensor, tensor._version)
        storage = tensor.untyped_storage()
        if storage._cdata in self._persistent or storage.nbytes() < SMALL:
            return Kept(self._alias(tensor), tensor._version)
        node = self._find(tensor)
        if node is None:
            node = self._new(tensor, tensor._version)
        if node.storage is not None and not node.storage.asked:
            node.storage.asked = True
            self.asked += node.storage.nbytes
        if node.tensor is None and not self._dropped(node):
            node.hold(self._alias(tensor))
            if node.storage is not None and not node.storage.kept:
                node.storage.kept = True
                self.kept += node.storage.nbytes
        return node

    def _alias(self, tensor: Tensor) -> Tensor:
        """The same memory and version, without the graph behind it, which would hold itself."""
        if tensor.grad_fn is None:
            return tensor
        if type(tensor) is Tensor:
            with torch._C._DisableTorchDispatch():
                return tensor.detach()
        self._busy = True
        try:
            return tensor.detach()
        finally:
            self._busy = False

    def _dropped(self, node: Node) -> bool:
        """Whether the tensor need not be kept; what its recipe needs is held from now on."""
        if node.again is None or node.persistent or (node.storage is not None and node.storage.kept):
            return False
        home = node.base or node
        if home.saved:
            return True
        if home.tensor is not None or home.level > DEEPEST:
            return False
        leaves: dict[int, tuple[Node, Tensor]] = {}
        chain: dict[int, Node] = {}
        if not closure(home, leaves, chain, set()):
            return False
        back = sum(node.back for node in chain.values())
        if back > LONGEST * home.nbytes:
            return False
        for leaf, tensor in leaves.values():
            leaf.hold(self._alias(tensor))
        home.saved, home.rank = True, 1 + max((node.rank for node in chain.values()), default=0)
        home.back = back + (home.nbytes if home.stays else 0)
        return True


class _Running(threading.local):
    """The recorders that are active in this thread."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []


_running = _Running()


@contextmanager
def paused() -> Iterator[None]:
    """Within this context the recorder that is active, if one is, looks away: autograd keeps what it always keeps.

    Of tensors that come out, nothing is known: what they are needed for, they are kept for. Where others have had
    their say since (a checkpoint's hooks, another mode), they keep it.
    """
    recorder = _running.recorders[-1] if _running.recorders else None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    answers = recorder is not None and hooks is not None and getattr(hooks[0], "__self__", None) is recorder
    modes = _get_current_dispatch_mode_stack()
    records = bool(modes) and modes[-1] is recorder
    if recorder is None:
        yield
        return
    if answers:
        recorder._hooks.__exit__()
    if records:
        recorder.__exit__(None, None, None)
    try:
        yield
    finally:
        if answers:
            recorder._hooks.__enter__()
        if records:
            recorder.__enter__()


def _is_cast_of_parameter(func: Any, inputs: Any) -> bool:
    """Autocast's copies of weights are kept: the weights may change before the backward pass, their copies not."""
    first = inputs[0][0] if inputs[0] else None
    return recipes.name_of(func) in recipes.MOVES and isinstance(first, Node) and first.persistent


def _is_large(args: Any) -> bool:
    first = args[0] if args else None
    return not isinstance(first, Tensor) or first.nbytes >= SMALL


def _itself(x: Tensor, **_: Any) -> Tensor:
    return x


def _batch_norm(func: Any, args: Any, given: Any, out: Any) -> tuple[Callable[..., Tensor], Any]:
    """How to run a batch norm again: with the statistics that it had, which move without a new version."""
    if not recipes.normalises_by_batch(func, given):
        return _first_of(func), ([*args, *(t if t is None else t.clone() for t in given[3:5]), *given[5:]], {})
    statistics = []
    for tensor in out[1:3]:
        node = Node((), tensor.nbytes, tensor._version)
        node.hold(tensor)
        statistics.append(node)
    return recipes.batch_norm, ([*args, *statistics], {})


def _first_of(func: Any) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: func(*args, **kwargs)[0]


def _view_of(func: Any, place: int | None) -> Callable[..., Tensor]:
    return func if place is None else lambda *args, **kwargs: func(*args, **kwargs)[place]


def _unpack(kept: Any) -> Tensor:
    found: Tensor = kept.value()
    return found


class _Kind:
    """What an operator does, as far as it matters here."""

    __slots__ = ("again", "batch_norm", "code", "copies", "inplace", "nothing", "view", "writes")

    def __init__(self, func: Any) -> None:
        self.view = recipes.is_view(func)
        self.writes = recipes.writes(func)
        self.again = None if self.view else recipes.cheap(func)
        self.inplace = None if self.again is None else recipes.in_place(func)
        self.batch_norm = self.again is not None and recipes.is_batch_norm(func)
        self.copies = recipes.name_of(func) == "clone"
        self.code = recipes.CODES.get(recipes.name_of(func))
        self.nothing = not (self.view or self.writes or self.again or self.code)


_KINDS: dict[Any, _Kind] = {}


def _kind(func: Any) -> _Kind:
    kind = _KINDS.get(func)
    if kind is None:
        kind = _KINDS[func] = _Kind(func)
    return kind
