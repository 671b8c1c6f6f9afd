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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from . import recipes
from .kinds import KINDS, Kind, kind_of
from .nodes import DEEPEST, ChangedInPlace, Kept, Ledger, Memory, Node, closure, mapped, spec_of
from .share import Candidate, Plan

SMALL = 1024
"""Bytes of a tensor that is not worth a recipe."""
VECTOR = 64 * 1024
"""The same for vectors, such as the statistics of norms."""
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
        plan: results that stay although they could be computed again.
        to_the_end: count bytes also where the plan has nothing left to do.

    Attributes:
        kept: bytes held for the backward pass, each storage once; persistent ones are not counted.
        asked: bytes that autograd asked to hold.
        candidates: what was dropped.

    Example:
        >>> x, weight = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)
        >>> with Recorder().active() as recorder:
        ...     y = torch.nn.functional.gelu(x @ weight) @ weight
        >>> recorder.kept == 2 * x.nbytes + weight.nbytes  # the input and the first product, not what gelu made of it
        True
    """

    def __init__(self, persistent: Iterable[Tensor] = (), plan: Plan | None = None, to_the_end: bool = False) -> None:
        super().__init__()
        self.kept = self.asked = 0
        self.candidates: list[Candidate] = []
        self._plan = plan or Plan()
        self._awaited = dict(self._plan.last)
        self._to_the_end = to_the_end or plan is None
        self._done = False
        self._places: dict[str, int] = defaultdict(int)
        self._ledger = Ledger()
        stay = [t for t in persistent if type(t) in _TYPES and t.layout is torch.strided]
        self._stay = {id(tensor) for tensor in stay}
        self._persistent = {tensor.untyped_storage()._cdata for tensor in stay}
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
        if not _is_plain(result) or result.nbytes < SMALL or (kind.moves and _is_of_model(inputs)):
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
            node.again, node.base = _itself, first.base or first
        node.follows_from(*inputs)

    def _note_view(self, func: Any, source: Node, args: Any, kwargs: Any, out: Any) -> None:
        several = isinstance(out, (list, tuple))
        for place, view in enumerate(out if several else [out]):
            if not _is_plain(view):
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
        if not _is_plain(result) or result.nbytes < SMALL or not code.fits(*args, **kwargs):
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
        key = storage._cdata
        memory = self._memory.get(key)
        if memory is None:
            memory = self._memory[key] = Memory(storage, self._ledger)
        spec = spec_of(tensor)
        node = Node(spec, tensor.nbytes, version)
        node.storage = memory
        if key in self._persistent:
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
        if not _is_plain(tensor):
            return None
        node = self._find(tensor, tensor.untyped_storage())
        return node if node is not None and node.again is not None else None

    def _node(self, value: Any) -> Any:
        """The node of a tensor, or the tensor if it stays anyway; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, nn.Parameter):  # of a trace, too, whose type is FakeTensor
            return Kept(value, value._version)
        if not _is_plain(value):
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
        elif isinstance(written, Tensor) and id(written) not in self._stay and _is_plain(written):
            memory = self._memory.get(written.untyped_storage()._cdata)
            if memory is not None:
                memory.nodes.clear()

    # --- what autograd keeps ---------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Any:
        if self._done:
            return self._alias(tensor), tensor._version
        if id(tensor) in self._stay:
            if tensor.requires_grad:
                self._ledger.limit -= tensor.nbytes
            return tensor, tensor._version
        if not _is_plain(tensor):
            return tensor, tensor._version
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes < SMALL or (nbytes < VECTOR and tensor.dim() < 2):
            if storage._cdata not in self._persistent:
                self.asked += nbytes
                self.kept += nbytes
            return self._alias(tensor), tensor._version
        if storage._cdata in self._persistent:
            if tensor.requires_grad:
                self._ledger.limit -= tensor.nbytes
            return self._alias(tensor), tensor._version
        node = self._find(tensor, storage) or self._new(tensor, tensor._version, storage)
        memory: Any = node.storage
        if not memory.asked:
            memory.asked = True
            self.asked += memory.nbytes
        if node.tensor is None and not self._dropped(node):
            node.hold(self._alias(tensor))
            if not memory.kept:
                memory.keep()
                self.kept += memory.nbytes
        return node

    def _alias(self, tensor: Tensor) -> Tensor:
        """The same memory and version, without the graph behind it, which would hold itself."""
        if tensor.is_leaf:
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
        memory: Any = node.storage
        if node.again is None or node.persistent or memory.kept:
            return False
        home = node.base or node
        if home.saved:
            return True
        if home.tensor is not None or home.level > DEEPEST:
            return False
        op = home.kind.name
        place = self._places[op]
        self._places[op] += 1
        leaves: dict[int, tuple[Node, Tensor]] = {}
        chain: dict[int, Node] = {}
        own: dict[int, Node] = {}
        if self._awaited.get(op) == place:
            del self._awaited[op]
            self._done = not (self._awaited or self._to_the_end)
        if place in self._plan.spared.get(op, ()) or not closure(home, leaves, chain, own):
            return False
        back = sum(node.back for node in chain.values())
        if back > LONGEST * home.nbytes:
            return False
        for leaf, tensor in leaves.values():
            leaf.hold(self._alias(tensor))
        home.saved, home.rank = True, 1 + max((node.rank for node in chain.values()), default=0)
        home.back = back + (home.nbytes if home.stays else 0)
        again = [one for one in (home, *own.values()) if one.kind is not None]
        work = sum(one.kind.weight * one.nbytes for one in again)
        self.candidates.append(Candidate(op, place, memory.nbytes, work, len(again)))
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


def _is_of_model(inputs: Any) -> bool:
    """Autocast's copies of weights are kept: the weights may change before the backward pass, their copies not."""
    first = inputs[0][0] if inputs[0] else None
    if isinstance(first, Kept):
        return isinstance(first.tensor, nn.Parameter)
    return isinstance(first, Node) and first.persistent


def _is_large(args: Any) -> bool:
    first = args[0] if args else None
    return not isinstance(first, Tensor) or first.nbytes >= SMALL


def _itself(x: Tensor, **_: Any) -> Tensor:
    return x


def _batch_norm(func: Any, args: Any, given: Any, out: Any) -> tuple[Callable[..., Tensor], Any]:
    """How to run a batch norm again: with the statistics that it had, which move without a new version."""
    if not recipes.normalises_by_batch(func, given):
        return _first_of(func), ([*args, *(t if t is None else t.clone() for t in given[3:5]), *given[5:]], {})
    return recipes.batch_norm, ([*args, *(Kept(tensor, tensor._version) for tensor in out[1:3])], {})


def _first_of(func: Any) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: func(*args, **kwargs)[0]


def _view_of(func: Any, place: int | None) -> Callable[..., Tensor]:
    return func if place is None else lambda *args, **kwargs: func(*args, **kwargs)[place]


def _unpack(kept: Any) -> Tensor:
    if type(kept) is not tuple:
        found: Tensor = kept.value()
        return found
    tensor, version = kept
    if tensor._version != version:
        raise ChangedInPlace(tensor.shape, tensor._version, version)
    return tensor
