"""Tensors that the backward pass may ask for: held, or how to compute them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .witness import Witness

DEEPEST = 150
"""Operators in a row that may be run again for one tensor (as Python's recursion, too)."""

STRIDE = 3
"""Of tensors that are computed from each other, such as the sums of a stage, so many's last one stays on the way."""

FEW = 1 / 64
"""All of them stay if one takes at most this share of what is held by then: they would be computed several times."""

WORKING = 4
"""Tensors of one size in a step of the backward pass: the one that stays, gradients, what is on the way."""


class ChangedInPlace(RuntimeError):
    """A tensor that the backward pass needs was changed after the forward pass."""

    @classmethod
    def at(cls, shape: torch.Size, found: int, expected: int) -> ChangedInPlace:
        """The sentence for a tensor of a shape that is at one version in place of another."""
        return cls(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(shape)} is at version {found}; expected version {expected} instead. Change it out of "
            "place, or after backward()"
        )


class Ledger:
    """Bytes that one pass holds for its backward pass: now, and how many there may be.

    The limit is what the forward pass ends with, less the gradients of weights. The backward pass lets go of tensors
    step by step, and gradients appear: what is left is room for tensors that were computed again.
    """

    __slots__ = ("limit", "now")

    def __init__(self) -> None:
        self.now = self.limit = 0

    def fits(self, nbytes: int) -> bool:
        """Whether a tensor of so many bytes may stay, and a step with its like takes no more than there was before."""
        return self.now + WORKING * nbytes <= self.limit


class Entry:
    """Bytes in a ledger, as long as this lives."""

    __slots__ = ("ledger", "nbytes")

    def __init__(self, ledger: Ledger, nbytes: int) -> None:
        self.ledger, self.nbytes = ledger, nbytes
        ledger.now += nbytes

    def __del__(self) -> None:
        self.ledger.now -= self.nbytes


class Kept:
    """A tensor as it is, for a recipe: a parameter, or a small one."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor, version: int) -> None:
        self.tensor, self.version = tensor, version

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            ChangedInPlace: where it was changed since.
        """
        if self.tensor._version != self.version:
            raise ChangedInPlace.at(self.tensor.shape, self.tensor._version, self.version)
        return self.tensor


class Node:
    """A tensor at a moment: held, or to be computed from others.

    Attributes:
        tensor: held, or None.
        version: of its memory at that moment.
        alive: the tensor, as long as somebody else holds it.
        again: computes it; None where only holding helps.
        inputs: arguments of ``again``, with nodes (or kept tensors) in place of tensors.
        sources: the nodes among these, as often as they are there.
        inplace: does the same in the memory of the first argument, or is None.
        kind: the operator's.
        base: the node whose memory this one is a view of, if that one has a recipe.
        saved: whether autograd asked for it: it is then computed once.
        readers: recipes that use it.
        memo: the tensor, computed again.
        rank: saved nodes in a row behind it that are computed with it, itself included.
        stays: whether it stays when it is computed for another, however little room there is.
        back: bytes that stay when it is computed for another.
        level: operators in a row behind it.
        writes: how often its memory may have been written to, as far as is known, if nothing is asked of ``version``.
        spec: type, shape and strides; these are None where they do not matter.
        witness: what it has to agree with, once it is computed again.
    """

    tensor: Tensor | None = None
    alive: Callable[[], Tensor | None] | None = None
    again: Callable[..., Tensor] | None = None
    inputs: tuple[Sequence[Any], dict[str, Any]] = (), {}
    sources: tuple[Node, ...] = ()
    inplace: Any = None
    kind: Any = None
    base: Node | None = None
    saved = persistent = stays = False
    memo: Tensor | None = None
    readers = back = rank = level = 0
    writes = 0
    storage: Memory | None = None
    ledger: Ledger | None = None
    entry: Entry | None = None
    witness: Witness | None = None

    def __init__(self, spec: tuple[Any, ...], nbytes: int, version: int) -> None:
        self.spec, self.nbytes, self.version = spec, nbytes, version

    def hold(self, tensor: Tensor) -> None:
        """Hold the tensor itself; how it came about does not matter any more."""
        self.tensor, self.alive, self.again, self.base = tensor, None, None, None
        self.inputs, self.sources, self.inplace, self.level, self.back = Node.inputs, (), None, 0, 0

    def follows_from(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
        """What its recipe is given; the nodes among it have a reader more."""
        self.inputs = args, kwargs or {}
        self.sources = tuple(_nodes(*self.inputs))
        level = 0
        for source in self.sources:
            source.readers += 1
            level = max(level, source.level)
        self.level = level + 1

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            ChangedInPlace: where it, or one that it is computed from, was changed since.
            ComputedOtherwise: where it was written to unseen before it was dropped.
        """
        if self.tensor is not None:
            return self.held(self.tensor)
        if self.witness is None and self.memo is not None:
            return self.memo
        if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            with torch.no_grad(), torch._C._DisableAutocast():
                return self._returned()
        return self._returned()

    def _returned(self) -> Tensor:
        """The tensor computed again, unless it was before, and compared with what is remembered of it."""
        found = self.memo
        if found is None:
            if self.base is not None:
                self.base.value()  # it stays there, for further views of it
            found, _ = self.computed({})
            if self.saved and self.memo is None:
                self.remember(found)
        if self.witness is not None:
            self.witness.check(found)
            self.witness = None
        return found

    def remember(self, tensor: Tensor) -> None:
        """Have the tensor stay: it will be asked for again."""
        self.memo = tensor
        if self.ledger is not None and self.base is None:
            self.entry = Entry(self.ledger, self.nbytes)

    def drop(self, chain: dict[int, Node], back: int) -> None:
        """Autograd asked for it, and it will be computed again.

        Args:
            chain: saved nodes that come back with it.
            back: bytes of these that stay.
        """
        self.saved, self.rank = True, 1 + max((node.rank for node in chain.values()), default=0)
        self.stays = self.rank % STRIDE == 0 or self.nbytes <= FEW * self.ledger.limit  # type: ignore[union-attr]
        self.back = back + (self.nbytes if self.stays else 0)

    def held(self, tensor: Tensor) -> Tensor:
        """The tensor that is held, if it is still what it was."""
        if tensor._version != self.version:
            raise ChangedInPlace.at(tensor.shape, tensor._version, self.version)
        return tensor

    def computed(self, shared: dict[int, Tensor]) -> tuple[Tensor, bool]:
        """The tensor, and whether nobody else reads its memory.

        Saved ones on the way stay where there is room, in what the backward pass has let go. Where there is none, as at
        its start, only some stay of those in a row (``STRIDE``): each of the others is a few steps from one of these
        when its turn comes.
        """
        if self.tensor is not None:
            return self.held(self.tensor), False
        if self.memo is not None:
            return self.memo, False
        if id(self) in shared:
            return shared[id(self)], False
        found: dict[int, tuple[Tensor, bool]] = {}
        sources = [source for source in self.sources if source.tensor is None]
        if len(sources) > 1:  # the others would wait for the deepest
            sources.sort(key=_level, reverse=True)
        for source in sources:
            if id(source) not in found:
                found[id(source)] = source.computed(shared)

        args, kwargs = self.inputs
        given = [_given(argument, found) for argument in args]
        more = {name: _given(argument, found) for name, argument in kwargs.items()} if kwargs else kwargs
        owned = bool(found) and type(args[0]) is Node and found.get(id(args[0]), _NOT_OWNED)[1]
        dtype, shape, stride = self.spec
        if owned and self.inplace is not None and _is_like(given[0], dtype, shape, stride):
            out: Tensor = self.inplace(*given, **more)
        else:
            out = self.again(*given, **more)  # type: ignore[misc]
            if out.dtype is not dtype:  # it was written in place of a narrower one
                out = out.to(dtype)
        if self.base is None and stride is not None and out.stride() != stride:
            out = torch.empty_strided(shape, stride, dtype=out.dtype, device=out.device).copy_(out)
        stays = self.saved and self.base is None and (self.stays or self.ledger.fits(self.nbytes))  # type: ignore[union-attr]
        if stays:
            self.remember(out)
        elif self.readers > 1:
            shared[id(self)] = out
        return out, self.base is None and not stays and self.readers <= 1


class Memory:
    """A storage that the recorder knows: its address is taken as long as this lives."""

    __slots__ = ("asked", "entry", "ledger", "nbytes", "nodes", "weak")

    def __init__(self, storage: torch.UntypedStorage, ledger: Ledger) -> None:
        self.weak = storage._weak_ref()
        self.nbytes = storage.nbytes()
        self.nodes: dict[tuple[Any, ...], Node] = {}
        self.ledger = ledger
        self.asked = False
        self.entry: Entry | None = None

    def __del__(self, free: Callable[[Any], None] = torch.UntypedStorage._free_weak_ref) -> None:  # torch may be gone
        free(self.weak)

    @property
    def kept(self) -> bool:
        """Whether it stays for the backward pass."""
        return self.entry is not None

    def keep(self) -> None:
        """It stays for the backward pass, as long as nodes say so."""
        self.entry = Entry(self.ledger, self.nbytes)
        self.ledger.limit += self.nbytes


def spec_of(tensor: Tensor) -> tuple[Any, ...]:
    """Type, shape and strides."""
    return tensor.dtype, tensor.shape, tensor.stride()


def mapped(function: Callable[[Any], Any], argument: Any) -> Any:
    """The function of an argument, or of each in a list."""
    return [function(one) for one in argument] if isinstance(argument, (list, tuple)) else function(argument)


def closure(node: Node, leaves: dict[int, tuple[Node, Tensor]], chain: dict[int, Node], own: dict[int, Node]) -> bool:
    """Collect what a recipe needs; False where something is not kept anyway.

    Args:
        node: whose recipe it is.
        leaves: tensors that the recipe starts from, which are to be held.
        chain: other saved nodes that come back with it.
        own: nodes that are computed for this one alone.
    """
    for source in node.sources:
        if source.tensor is not None or id(source) in own or id(source) in leaves:
            continue
        if source.saved:
            chain[id(source)] = source
        elif source.again is not None:
            own[id(source)] = source
            if len(own) + len(leaves) + len(chain) > DEEPEST or not closure(source, leaves, chain, own):
                return False
        else:
            alive = None if source.alive is None else source.alive()
            kept = source.storage is not None and source.storage.kept
            if alive is None or not kept or alive._version != source.version:
                return False
            leaves[id(source)] = source, alive
    return True


_NOT_OWNED = (None, False)


def _is_like(x: Tensor, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...] | None) -> bool:
    return x.dtype is dtype and x.shape == shape and (stride is None or x.stride() == stride)


def _level(node: Node) -> int:
    return node.level


def _nodes(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Node]:
    for argument in (*args, *kwargs.values()) if kwargs else args:
        if type(argument) is Node:
            yield argument
        elif type(argument) is list or type(argument) is tuple:
            yield from (one for one in argument if type(one) is Node)


def _given(argument: Any, found: dict[int, tuple[Tensor, bool]]) -> Any:
    """An argument of a recipe as the operator takes it."""
    if type(argument) is Node:
        return argument.held(argument.tensor) if argument.tensor is not None else found[id(argument)][0]
    if isinstance(argument, Kept):
        return argument.value()
    if isinstance(argument, (list, tuple)):
        return [_given(one, found) for one in argument]
    return argument
