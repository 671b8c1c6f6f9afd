"""What a training step keeps for its backward pass: of what is cheap to compute again, only how to.

Autograd's hooks for saved tensors ask a ``Keeper`` what to keep. A tensor whose recipe needs only what is kept anyway
is not kept: the backward pass computes it again when it is asked for, once, and lets it go with the last node that
holds it. So the saved values are the same, and every gradient is computed by torch's own kernels. Recipes come from one
of two: ``keeping.Recorder`` sees every operator, ``reading.Reader`` reads autograd's graph.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .nodes import DEEPEST, Kept, Ledger, Memory, Node, closure
from .share import Candidate, Plan
from .witness import Witness

SMALL = 1024
"""Bytes of a tensor that is not worth a recipe."""
VECTOR = 64 * 1024
"""The same for vectors, such as the statistics of norms."""
LONGEST = 4
"""Tensors of its own size that may come back with one: sums of a stage of a network need all sums before them."""


TYPES = frozenset((Tensor, nn.Parameter, torch._subclasses.fake_tensor.FakeTensor))


def is_plain(tensor: Any) -> bool:
    """Whether its place in memory and its version say all about its values."""
    return (
        type(tensor) in TYPES
        and tensor.layout is torch.strided
        and not (tensor.dtype.is_complex or tensor.is_neg() or tensor.is_inference())
    )


class Keeper:
    """Within its ``active()``, autograd keeps of what is cheap to compute again only how to.

    Args:
        persistent: tensors that stay anyway: parameters and buffers.
        plan: results that stay although they could be computed again.
        to_the_end: count bytes also where the plan has nothing left to do.

    Attributes:
        kept: bytes held for the backward pass, each storage once; persistent ones are not counted.
        asked: bytes that autograd asked to hold.
        candidates: what was dropped.
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
        stay = [t for t in persistent if type(t) in TYPES and t.layout is torch.strided]
        self._stay = {id(tensor) for tensor in stay}
        self._persistent = {tensor.untyped_storage()._cdata for tensor in stay}
        self._memory: dict[int, Memory] = {}
        self._busy = False

    @contextmanager
    def active(self) -> Iterator[Keeper]:
        """Answer autograd."""
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        with self._hooks, self._watching():
            _running.keepers.append(self)
            try:
                yield self
            finally:  # recipes that are needed live with autograd's nodes
                _running.keepers.remove(self)
                self._forget_all()
                del self._hooks  # which hold this keeper

    def _watching(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _forget_all(self) -> None:
        for memory in self._memory.values():
            memory.nodes.clear()
        self._memory.clear()

    def _node_of(self, tensor: Tensor, storage: torch.UntypedStorage) -> Node:
        """The node of a tensor that autograd asks to keep."""
        raise NotImplementedError

    def _memory_of(self, storage: torch.UntypedStorage) -> Memory:
        memory = self._memory.get(storage._cdata)
        if memory is None:
            memory = self._memory[storage._cdata] = Memory(storage, self._ledger)
        return memory

    def _pack(self, tensor: Tensor) -> Any:
        if self._done:
            return Kept(self._alias(tensor), tensor._version)
        if id(tensor) in self._stay:
            if tensor.requires_grad:
                self._ledger.limit -= tensor.nbytes
            return Kept(tensor, tensor._version)
        if not is_plain(tensor):
            return Kept(tensor, tensor._version)
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes < SMALL or (nbytes < VECTOR and tensor.dim() < 2):
            if storage._cdata not in self._persistent:
                self.asked += nbytes
                self.kept += nbytes
            return Kept(self._alias(tensor), tensor._version)
        if storage._cdata in self._persistent:
            if tensor.requires_grad:
                self._ledger.limit -= tensor.nbytes
            return Kept(self._alias(tensor), tensor._version)
        node = self._node_of(tensor, storage)
        memory: Any = node.storage
        if not memory.asked:
            memory.asked = True
            self.asked += memory.nbytes
        if node.tensor is None:
            if self._dropped(node):
                self._witness(node, tensor)
            else:
                self._hold(node, self._alias(tensor))
                if not memory.kept:
                    memory.keep()
                    self.kept += memory.nbytes
        return node

    def _witness(self, node: Node, tensor: Tensor) -> None:
        """Remember of a tensor that is dropped what tells whether it came back; asked again, it has to be the same."""
        if type(tensor) is not Tensor:
            return
        if node.witness is None:
            node.witness = Witness.of(tensor)
        else:
            node.witness.check(tensor)

    def _hold(self, node: Node, tensor: Tensor) -> None:
        """Hold a tensor; what it is a copy of need not be computed again for others, either."""
        source = node.base if node.again is itself else None
        node.hold(tensor)
        if source is not None and source.tensor is None and not source.saved and source.spec == node.spec:
            source.hold(tensor)
            source.version, source.storage = node.version, node.storage

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
        home.drop(chain, back)
        again = [one for one in (home, *own.values()) if one.kind is not None]
        work = sum(one.kind.weight * one.nbytes for one in again)
        self.candidates.append(Candidate(op, place, memory.nbytes, work, len(again)))
        return True


class _Running(threading.local):
    """The keepers that are active in this thread."""

    def __init__(self) -> None:
        self.keepers: list[Keeper] = []


_running = _Running()


def keeps() -> bool:
    """Whether a lean network is in its forward pass in this thread."""
    return bool(_running.keepers)


@contextmanager
def paused() -> Iterator[None]:
    """Within this context the keeper that is active, if one is, looks away: autograd keeps what it always keeps.

    Of tensors that come out, nothing is known: what they are needed for, they are kept for. Where others have had
    their say since (a checkpoint's hooks, another mode), they keep it.
    """
    keeper: Any = _running.keepers[-1] if _running.keepers else None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    answers = keeper is not None and hooks is not None and getattr(hooks[0], "__self__", None) is keeper
    modes = _get_current_dispatch_mode_stack()
    records = bool(modes) and modes[-1] is keeper
    if keeper is None:
        yield
        return
    if answers:
        keeper._hooks.__exit__()
    if records:
        keeper.__exit__(None, None, None)
    try:
        yield
    finally:
        if answers:
            keeper._hooks.__enter__()
        if records:
            keeper.__enter__()


def itself(x: Tensor, **_: Any) -> Tensor:
    """What a copy of ``x`` is, when it is computed again."""
    return x


def _unpack(kept: Any) -> Tensor:
    found: Tensor = kept.value()
    return found
