"""Tensors that the backward pass may ask for: held, or how to compute them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

DEEPEST = 150
"""Operators in a row that may be run again for one tensor (as Python's recursion, too)."""

STRIDE = 3
"""Of tensors that are computed from each other, such as the sums of a stage, so many's last one stays on the way."""


class ChangedInPlace(RuntimeError):
    """A tensor that the backward pass needs was changed after the forward pass."""

    def __init__(self, shape: torch.Size, found: int, expected: int) -> None:
        super().__init__(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(shape)} is at version {found}; expected version {expected} instead. Change it out of "
            "place, or after backward()"
        )


class Node:
    """A tensor at a moment: held, or to be computed from others.

    Attributes:
        tensor: held, or None.
        version: of its memory at that moment.
        alive: the tensor, as long as somebody else holds it.
        again: computes it; None where only holding helps.
        inputs: arguments of ``again``, with nodes in place of tensors.
        inplace: does the same in the memory of the first argument, or is None.
        base: the node whose memory this one is a view of, if that one has a recipe.
        saved: whether autograd asked for it: it is then computed once.
        readers: recipes that use it.
        memo: the tensor, computed again.
        rank: saved nodes in a row behind it that are computed with it, itself included.
        back: bytes that stay when it is computed for another.
        level: operators in a row behind it.
    """

    __slots__ = (
        "again",
        "alive",
        "back",
        "base",
        "inplace",
        "inputs",
        "level",
        "memo",
        "nbytes",
        "persistent",
        "rank",
        "readers",
        "saved",
        "spec",
        "storage",
        "tensor",
        "version",
    )

    def __init__(self, spec: tuple[Any, ...], nbytes: int, version: int) -> None:
        self.spec, self.nbytes, self.version = spec, nbytes, version
        self.tensor: Tensor | None = None
        self.alive: Callable[[], Tensor | None] | None = None
        self.again: Callable[..., Tensor] | None = None
        self.inputs: tuple[Sequence[Any], dict[str, Any]] = ((), {})
        self.inplace: Any = None
        self.base: Node | None = None
        self.saved = False
        self.persistent = False
        self.readers = 0
        self.memo: Tensor | None = None
        self.back = self.rank = self.level = 0
        self.storage: Memory | None = None

    def hold(self, tensor: Tensor) -> None:
        """Hold the tensor itself; how it came about does not matter any more."""
        self.tensor, self.alive, self.again, self.base = tensor, None, None, None
        self.inputs, self.inplace, self.level, self.back = ((), {}), None, 0, 0

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            ChangedInPlace: where it, or one that it is computed from, was changed since.
        """
        if self.tensor is not None:
            return self.held(self.tensor)
        if self.memo is not None:
            return self.memo
        if self.base is not None:
            self.base.value()  # it stays there, for further views of it
        with torch.no_grad(), torch._C._DisableAutocast():
            found, _ = self.computed({})
        if self.saved:
            self.memo = found
        return found

    @property
    def stays(self) -> bool:
        """Whether it stays when it is computed for another."""
        return self.saved and self.rank % STRIDE == 0

    def held(self, tensor: Tensor) -> Tensor:
        """The tensor that is held, if it is still what it was."""
        if tensor._version != self.version:
            raise ChangedInPlace(tensor.shape, tensor._version, self.version)
        return tensor

    def computed(self, shared: dict[int, Tensor]) -> tuple[Tensor, bool]:
        """The tensor, and whether nobody else reads its memory.

        Of saved ones in a row only some stay (``STRIDE``): each of the others is a few steps from one of these when its
        turn comes.
        """
        if self.tensor is not None:
            return self.held(self.tensor), False
        if self.memo is not None:
            return self.memo, False
        if id(self) in shared:
            return shared[id(self)], False
        args, kwargs = self.inputs
        found: dict[int, tuple[Tensor, bool]] = {}
        for source in sorted(sources(self), key=lambda node: -node.level):  # the others would wait for the deepest
            if id(source) not in found:
                found[id(source)] = source.computed(shared)

        def get(argument: Any) -> Any:
            return found[id(argument)][0] if isinstance(argument, Node) else argument

        owned = bool(args) and isinstance(args[0], Node) and found[id(args[0])][1]
        first, *rest = (mapped(get, argument) for argument in args)
        more = {name: mapped(get, argument) for name, argument in kwargs.items()}
        if owned and self.inplace is not None and spec_of(first) == self.spec:
            out: Tensor = self.inplace(first, *rest, **more)
        else:
            out = self.again(first, *rest, **more)  # type: ignore[misc]
        if self.base is None and out.stride() != self.spec[2]:
            out = torch.empty_strided(self.spec[1], self.spec[2], dtype=out.dtype, device=out.device).copy_(out)
        if self.stays:
            self.memo = out
        elif self.readers > 1:
            shared[id(self)] = out
        return out, self.base is None and not self.stays and self.readers <= 1


class Memory:
    """A storage that the recorder knows: its address is taken as long as this lives."""

    __slots__ = ("asked", "kept", "nbytes", "nodes", "weak")

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.weak = StorageWeakRef(storage)
        self.nbytes = storage.nbytes()
        self.nodes: dict[tuple[Any, ...], Node] = {}
        self.asked = self.kept = False


def spec_of(tensor: Tensor) -> tuple[Any, ...]:
    """Type, shape and strides."""
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


def mapped(function: Callable[[Any], Any], argument: Any) -> Any:
    """The function of an argument, or of each in a list."""
    return [function(one) for one in argument] if isinstance(argument, (list, tuple)) else function(argument)


def closure(node: Node, leaves: dict[int, tuple[Node, Tensor]], chain: dict[int, Node], seen: set[int]) -> bool:
    """Collect what a recipe needs, tensors and others that come back with it; False where one is not kept anyway."""
    for source in sources(node):
        if id(source) in seen:
            continue
        seen.add(id(source))
        if source.tensor is not None:
            continue
        if source.saved:
            chain[id(source)] = source
        elif source.again is not None:
            if len(seen) > DEEPEST or not closure(source, leaves, chain, seen):
                return False
        else:
            alive = None if source.alive is None else source.alive()
            kept = source.storage is not None and source.storage.kept
            if alive is None or not kept or alive._version != source.version:
                return False
            leaves[id(source)] = source, alive
    return True


def sources(node: Node) -> Iterator[Node]:
    """The nodes that a recipe reads, as often as it does."""
    args, kwargs = node.inputs
    for argument in (*args, *kwargs.values()):
        for one in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(one, Node):
                yield one


class Kept:
    """A small or strange tensor, as it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor, version: int) -> None:
        self.tensor, self.version = tensor, version

    def value(self) -> Tensor:
        """The tensor."""
        if self.tensor._version != self.version:
            raise ChangedInPlace(self.tensor.shape, self.tensor._version, self.version)
        return self.tensor
