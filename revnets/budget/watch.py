"""What a traced training step does, block by block: bytes that each keeps and needs for a moment, and seconds."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..layers.lean.recipes import is_view
from ..profiling.predict import in_place
from ..profiling.tracker import StorageTracker
from ..reversible.hooks import every_pass


@dataclass(frozen=True)
class Machine:
    """How fast a device is, roughly: what counts is the ratio of the two, and an operator's own cost.

    Attributes:
        flops: per second, of products of matrices.
        bandwidth: bytes per second, read or written.
        overhead: seconds per operator.
        link: bytes per second to the CPU's memory and back.
    """

    flops: float
    bandwidth: float
    overhead: float
    link: float = 1e10


MACHINES = {"cpu": Machine(6e10, 8e9, 4e-6), "cuda": Machine(4e13, 1.2e12, 6e-6, 2.5e10)}


def machine_of(device: torch.device) -> Machine:
    """The figures of a kind of device."""
    return MACHINES.get(device.type, MACHINES["cuda"])


@dataclass
class Span:
    """One call of a module in the forward pass.

    Attributes:
        name: of the module.
        depth: of calls around it.
        events: indices of the trace's events that are its own: from, and up to.
        nodes: numbers of autograd's nodes that it made: after, and up to.
        writes: whether it changed one of its inputs in place.
    """

    name: str
    depth: int
    events: tuple[int, int]
    nodes: tuple[int, int]
    writes: bool = False


@dataclass
class _Open:
    span: Span
    inputs: list[tuple[Tensor, int]] = field(default_factory=list)


class Watch(StorageTracker):
    """A tracker that also notes which module call each event belongs to, and what each operator costs."""

    def __init__(self, device: torch.device, traced_on: torch.device, names: dict[nn.Module, str]) -> None:
        self.spans: list[Span] = []
        self.nodes: list[int] = []  # of each event in the backward pass: number of autograd's node; else -1
        self.costs: list[tuple[int, int, float, bool]] = []  # index of the event, node, seconds, whether a product
        self._names_of = {module: name if place else "" for place, (module, name) in enumerate(names.items())}
        self._open: list[_Open] = []
        self._machine = machine_of(device)
        super().__init__(device, traced_on, names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        before, count = self.trace.flops[self.phase], len(self.costs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        counts = self.phase in ("forward", "backward") and not is_view(func)
        if counts and len(self.costs) == count:  # else its parts were counted
            moved = sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            flops, machine = self.trace.flops[self.phase] - before, self._machine
            seconds = flops / machine.flops + moved / machine.bandwidth + machine.overhead
            self.costs.append((len(self.trace.events), self._node(), seconds, flops > 0))
        return out

    def _note(self, block: int | None, change: int, replaces: int | None = None) -> None:
        super()._note(block, change, replaces)
        self.nodes.append(self._node())

    def _node(self) -> int:
        if self.phase != "backward":
            return -1
        node = torch._C._current_autograd_node()
        return -1 if node is None else node._sequence_nr()

    def during(self, phase: str) -> Any:
        """Name a part of the step; in the forward pass, calls of modules are noted."""
        return _Calls(self, phase, super().during(phase))

    def entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is called."""
        name = self._names_of.get(module, "?")
        span = Span(name, len(self._open), (len(self.trace.events), 0), (_newest_node(), 0))
        inputs = [(t, t._version) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._open.append(_Open(span, inputs))
        self.spans.append(span)

    def left(self) -> None:
        """The innermost module returns."""
        done = self._open.pop()
        done.span.events = done.span.events[0], len(self.trace.events)
        done.span.nodes = done.span.nodes[0], _newest_node()
        done.span.writes = any(t._version != version for t, version in done.inputs)


class _Calls:
    """The context of a phase, with hooks on all modules in the forward pass."""

    def __init__(self, watch: Watch, phase: str, inner: Any) -> None:
        self.watch, self.phase, self.inner = watch, phase, inner
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        self.inner.__enter__()
        if self.phase == "forward":
            modules = nn.modules.module
            # they look, and keep nothing: our layers take the way that they take without them
            enter = every_pass(lambda module, args: self.watch.entered(module, args, None), keeps=False)
            leave = every_pass(lambda *_: self.watch.left(), keeps=False)
            self.hooks = [
                modules.register_module_forward_pre_hook(enter),
                modules.register_module_forward_hook(leave, always_call=True),
            ]

    def __exit__(self, *exc: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.inner.__exit__(*exc)


def _newest_node() -> int:
    number: int = torch._C._autograd._get_sequence_nr()
    return number


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """A traced step by positions: even ones lie between blocks, odd ones are blocks, in the order of the calls.

    Attributes:
        resident: bytes before the step.
        kept: bytes that each position allocates and that are there when the forward pass ends.
        passed: bytes that each position leaves to the next ones, which are gone when the forward pass ends.
        forward: the most in use in each position's forward pass.
        backward: the most in use in each position's backward pass; 0 where it has none.
        begun: bytes in use when its backward pass begins; 0 where it has none.
        optimizer: the most in use in the optimizer's step; 0 without one.
        seconds: of each position, forward and backward.
        forward_seconds: of its forward pass alone.
    """

    resident: int
    kept: list[int]
    passed: list[int]
    forward: list[int]
    backward: list[int]
    begun: list[int]
    optimizer: int
    seconds: list[float]
    forward_seconds: list[float]

    def before(self, position: int) -> int:
        """Bytes that are there before the step, or kept by earlier positions."""
        return self.resident + sum(self.kept[:position])

    @property
    def total_seconds(self) -> float:
        """Of the whole step, without the optimizer."""
        return sum(self.seconds)

    @property
    def peak(self) -> int:
        """The most in use at any time."""
        return max(self.optimizer, *self.forward, *self.backward)


def figures_of(watch: Watch, blocks: Sequence[str]) -> Figures:
    """The figures of a step by these blocks, each called once, one after the other."""
    spans = {span.name: span for span in watch.spans}
    return _Count(watch, [spans[name] for name in blocks]).figures()


class _Count:
    def __init__(self, watch: Watch, spans: Sequence[Span]) -> None:
        self.watch = watch
        self.events = [edge for span in spans for edge in span.events]
        self.nodes = [edge for span in spans for edge in span.nodes]
        self.last_node = max((span.nodes[1] for span in watch.spans), default=-1)
        self.size = 2 * len(spans) + 1
        self.place = self.size - 1

    def figures(self) -> Figures:
        watch, size = self.watch, self.size
        blocks = watch.trace.blocks
        resident = now = sum(b.nbytes for b in blocks if b.phase == "setup" and b.category is not None)
        optimizer = 0
        forward, backward, begun = [0] * size, [0] * size, [0] * size
        kept, passed = [0] * size, [0] * size
        born: dict[int, int] = {}  # positions of the blocks of memory that are there
        index_of = {id(event): index for index, event in enumerate(watch.trace.events)}
        for event in in_place(watch.trace.events):
            if event.block is not None and blocks[event.block].phase == "setup":
                continue
            index = index_of[id(event)]
            before, now = now, now + event.change
            if event.phase == "forward":
                place = bisect_right(self.events, index)
                forward[place] = max(forward[place], before, now)
                if event.block is not None and event.change > 0:
                    born[event.block] = place
                    kept[place] += event.change
                elif event.block in born and (origin := born.pop(event.block)) is not None:
                    kept[origin] += event.change
                    passed[origin] -= event.change if origin < place else 0
            elif event.phase == "backward":
                place = self._at(watch.nodes[index])
                begun[place] = begun[place] or before
                backward[place] = max(backward[place], now)
            elif event.phase == "optimizer":
                optimizer = max(optimizer, now)
            if event.block is None:
                now = before
        seconds = self._seconds()
        for place in range(size):
            forward[place] = max(forward[place], resident + sum(kept[: place + 1]))
        return Figures(resident, kept, passed, forward, backward, begun, optimizer, *seconds)

    def _at(self, node: int) -> int:
        """The position of a node; the last one again for nodes of no forward pass (sums, inner graphs)."""
        if 0 <= node < self.last_node:
            self.place = bisect_right(self.nodes, node)
        return self.place

    def _seconds(self) -> tuple[list[float], list[float]]:
        both, ahead = [0.0] * self.size, [0.0] * self.size
        self.place = self.size - 1
        for index, node, seconds, _ in self.watch.costs:
            place = bisect_left(self.events, index) if node < 0 else self._at(node)
            both[place] += seconds
            if node < 0:
                ahead[place] += seconds
        return both, ahead
