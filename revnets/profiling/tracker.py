"""Follows every tensor storage from birth to release while fake tensors run: memory as a sequence of events."""

import functools
import sys
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..reversible import every_pass
from .flops import count_flops
from .kernel_memory import FAKE_KERNELS, decomposition, temporary_bytes

aten = torch.ops.aten


@dataclass
class Block:
    """One storage.

    Attributes:
        nbytes: as the device's allocator rounds it.
        phase: of the step in which it was allocated.
        recorded: allocated while autograd recorded (in the backward pass: by a recomputation).
        category: what it turned out to be, once known.
    """

    nbytes: int
    phase: str
    recorded: bool = False
    category: str | None = None


@dataclass
class Event:
    """A block is born or released, or (no block) a kernel needs bytes for a moment.

    Attributes:
        block: index, or None.
        change: in bytes.
        phase: of the step.
        where: op and module.
        replaces: block whose memory this one takes over if its release follows at once.
    """

    block: int | None
    change: int
    phase: str
    where: str
    replaces: int | None = None


@dataclass
class Trace:
    """What a traced step did, in order."""

    blocks: list[Block] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    flops: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)


class StorageTracker(TorchDispatchMode):
    """Dispatch mode that notes every storage that the ops inside it allocate and release.

    Each storage counts once with its own size, whatever views of it exist, from the op that makes it until its last
    reference dies. Entered inside ``FakeTensorMode``; values are never looked at.

    Args:
        device: whose kernels and allocator are meant.
        traced_on: device of the fake tensors to be counted; others (a step counter on CPU) are not.
        names: modules of the network and their names, to say where something happens.
    """

    def __init__(self, device: torch.device, traced_on: torch.device, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.device = device
        self.trace = Trace()
        self.phase = "setup"
        self.op = ""
        self._traced_on = traced_on
        self._granularity = 1 if device.type == "cpu" else 512  # bytes; CUDA's allocator hands out multiples
        self._known: dict[int, tuple[int, Any]] = {}  # id of a storage -> its block, and the weak reference
        self._where = _Where(names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for all the time
        if (parts := decomposition(func, self.device)) is not None:
            with self:
                return parts(*args, **kwargs)
        self.op = str(func)
        substitute = FAKE_KERNELS.get(func)
        if substitute is not None:
            out = substitute(*args, **kwargs)
        elif _changes_values_only(func) and args[0].constant is None:  # constants (Adam's step counters) have values
            out = args[0]  # nothing to do, and fake tensors would take long for it
        else:
            out = func(*args, **kwargs)
        self.trace.flops[self.phase] += count_flops(func, args, kwargs, out)
        self.trace.ops[self.op] += 1
        replaces = self._gradient_sum(func, args)
        for tensor in _tensors(out):
            self.follow(tensor, replaces=replaces)
        if extra := temporary_bytes(func, args, out, self.device):
            self._note(None, extra)
        return out

    def follow(self, tensor: Tensor, category: str | None = None, replaces: int | None = None) -> None:
        """Count the storage of ``tensor`` from now on, or say what an already counted one is."""
        if tensor.device.type != self._traced_on.type:
            return
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))
        if known is None:
            nbytes = -(-storage.nbytes() // self._granularity) * self._granularity
            index = len(self.trace.blocks)
            self.trace.blocks.append(Block(nbytes, self.phase, torch.is_grad_enabled(), category))
            self._known[id(storage)] = (index, weakref.ref(storage, self._releaser(id(storage), index)))
            self._note(index, nbytes, replaces)
        elif category is not None:
            self.trace.blocks[known[0]].category = category

    def alive(self) -> list[Block]:
        """Blocks that have not been released."""
        return [self.trace.blocks[index] for index, _ in self._known.values()]

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name a part of the step."""
        self.phase = phase
        with self._where.watching():
            yield

    def _note(self, block: int | None, change: int, replaces: int | None = None) -> None:
        where = f"{self.op} in {self._where(self.phase)}" if self.op and change > 0 else ""
        self.trace.events.append(Event(block, change, self.phase, where, replaces))

    def _releaser(self, key: int, index: int) -> Callable[[Any], None]:
        def released(_: Any) -> None:
            del self._known[key]
            self._note(index, -self.trace.blocks[index].nbytes)

        return released

    def _gradient_sum(self, func: Any, args: Any) -> int | None:
        """Block of the sum so far, when autograd's engine adds up gradients.

        With real tensors the engine adds in place to a sum that nobody else holds; with any dispatch mode on, it makes
        a new one. Whether nobody held it shows right afterwards: then it is released.
        """
        if func is not aten.add.Tensor or torch.is_grad_enabled() or not _called_by_engine():
            return None
        known = self._known.get(id(args[0].untyped_storage()))
        return known[0] if known else None


@functools.cache
def _changes_values_only(func: Any) -> bool:
    name = func._schema.name
    in_place = name.endswith("_") and "__" not in name and torch.Tag.pointwise in func.tags
    return in_place or name in ("aten::copy_", "aten::zero_", "aten::fill_", "aten::hardswish_")


def _called_by_engine() -> bool:
    frame = sys._getframe(3)
    while frame is not None and frame.f_code.co_name in ("_fn", "inner"):  # torch's own wrappers of a dispatch mode
        frame = frame.f_back  # type: ignore[assignment]
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for item in out:
            yield from _tensors(item)


class _Where:
    """The name of the module that is running; in the backward pass, of the module whose forward made the node.

    Autograd numbers its nodes in order; noting the number at every entry and exit of a module is enough to find the
    module of a node later.
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names
        self.stack: list[str] = []
        self.numbers, self.entered = [-1], [""]

    def __call__(self, phase: str) -> str:
        if self.stack:
            return self.stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return phase
        return self.entered[bisect_right(self.numbers, node._sequence_nr()) - 1] or node.name()

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = nn.modules.module.register_module_forward_pre_hook(every_pass(self._enter, keeps=False))
        after = nn.modules.module.register_module_forward_hook(every_pass(self._leave, keeps=False), always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self.stack.clear()

    def _enter(self, module: nn.Module, *_: Any) -> None:
        self.stack.append(self.names.get(module, type(module).__name__))
        self._mark()

    def _leave(self, *_: Any) -> None:
        if self.stack:
            self.stack.pop()
        self._mark()

    def _mark(self) -> None:
        self.entered.append(self("the loss"))
        self.numbers.append(torch._C._autograd._get_sequence_nr())
