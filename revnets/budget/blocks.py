"""Which parts of a network are its blocks: found in a traced step, from calls and bytes, not from names of classes."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..reversible import ReversibleOp
from .choices import can_be_planned, is_chain
from .watch import Span, Watch

COVERED, COVERED_BY_CHAINS = 0.9, 0.6
"""A module is taken apart where parts with several layers each hold this share of what it keeps; less is enough where
one of the parts is a Sequential of such parts: that is a stage, and its blocks are what we look for."""

LONG_CHAIN = 0.2
"""A Sequential of single layers is taken apart if it holds this share of what the network keeps."""

SMALLEST = 0.002
"""A part that keeps less than this share of the network's bytes is no block of its own."""

MOST_RUNS = 600
"""Runs of blocks that are considered: long chains only in some lengths."""


@dataclass
class Block:
    """A part of a network that gets a choice of its own.

    Attributes:
        name: of the module.
        position: in the order of the step (see ``Figures``).
        writes: whether it changes its input in place, so that it cannot be called again.
    """

    name: str
    position: int
    writes: bool = False


@dataclass(frozen=True)
class Run:
    """Blocks in a row that can be checkpointed as one.

    Attributes:
        name: of the module that they are, or of a run of a Sequential's children.
        first: position of the first block.
        last: position of the last one.
    """

    name: str
    first: int
    last: int


@dataclass
class Blocks:
    """The blocks of a network and the runs of them."""

    blocks: list[Block] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of the blocks."""
        return [block.name for block in self.blocks]


def find_blocks(model: nn.Module, watch: Watch, within: Collection[str] | None = None) -> Blocks:
    """The blocks of a network, in the order in which they are called.

    Args:
        model: that was traced.
        watch: of a step without choices.
        within: names of the modules that may be blocks; by default all.
    """
    return _Finder(model, watch, within).found()


@dataclass
class _Call:
    span: Span
    module: nn.Module | None
    calls: list[_Call] = field(default_factory=list)
    kept: int = 0
    layers: int = 0
    position: tuple[int, int] = (0, 0)


class _Finder:
    def __init__(self, model: nn.Module, watch: Watch, within: Collection[str] | None) -> None:
        self.watch = watch
        self.modules = dict(model.named_modules())
        times = Counter(span.name for span in watch.spans)
        self.alone = {name for name, count in times.items() if count == 1 and (within is None or name in within)}
        self.roots = self._tree()
        self.parts: list[_Call] = []

    def found(self) -> Blocks:
        found = Blocks()
        if not self.roots:
            return found
        root = self.roots[0]
        self.total = max(root.kept, 1)
        self._split(root)
        for index, part in enumerate(self.parts):
            position = 2 * index + 1
            part.position = (position, position)
            found.blocks.append(Block(part.span.name, position, part.span.writes))
        self._place(root)
        self._runs(root, found)
        found.runs = _some(found.runs)
        return found

    def _tree(self) -> list[_Call]:
        """The calls, each with those that it made, what it kept and how many products of matrices it ran."""
        alive = self._alive()
        products = [index for index, node, _, product in self.watch.costs if product and node < 0]
        roots: list[_Call] = []
        stack: list[_Call] = []
        for span in self.watch.spans:
            first, stop = span.events
            call = _Call(span, self.modules.get(span.name))
            call.kept = alive[min(stop, len(alive) - 1)] - alive[min(first, len(alive) - 1)]
            call.layers = bisect_right(products, stop) - bisect_right(products, first)
            del stack[span.depth :]
            (stack[-1].calls if stack else roots).append(call)
            stack.append(call)
        return roots

    def _alive(self) -> list[int]:
        """Bytes in use before each event of the forward pass."""
        trace, now, alive = self.watch.trace, 0, [0]
        for event in trace.events:
            if event.phase not in ("setup", "forward"):
                break
            now += 0 if event.block is None else event.change
            alive.append(now)
        return alive

    def _split(self, call: _Call, is_root: bool = True) -> None:
        """Collect the blocks of a call: itself, or those that it is made of."""
        parts = self._parts(call, is_root)
        if parts:
            for part in parts:
                if part.layers > 1:
                    self._split(part, is_root=False)
                elif part.kept >= SMALLEST * self.total:
                    self.parts.append(part)
            for inner in call.calls:
                if inner.layers > 1 and not self._usable(inner):
                    self._split(inner)  # called several times, or of no kind that can be changed: what is in it may be
        elif not is_root and call.kept >= SMALLEST * self.total:
            self.parts.append(call)
        self.parts.sort(key=lambda c: c.span.events)

    def _parts(self, call: _Call, is_root: bool) -> list[_Call]:
        """What a call is made of, if it should be taken apart."""
        if isinstance(call.module, ReversibleOp):
            return []  # whose streams belong together
        usable = [c for c in call.calls if self._usable(c)]
        compound = [c for c in usable if c.layers > 1]
        chain = call.module is not None and is_chain(call.module)
        if chain and not compound:
            long = is_root or (call.layers > 3 and call.kept >= LONG_CHAIN * self.total)
            return usable if long else []
        if chain:
            compound = usable
        share = COVERED_BY_CHAINS if any(self._is_stage(c) for c in compound) else COVERED
        covered = sum(c.kept for c in compound) >= share * call.kept
        several = len(compound) > 1 or share < COVERED
        return compound if compound and (is_root or (several and covered)) else []

    def _is_stage(self, call: _Call) -> bool:
        return call.module is not None and is_chain(call.module) and sum(c.layers > 1 for c in call.calls) > 1

    def _usable(self, call: _Call) -> bool:
        return call.span.name in self.alone and call.module is not None and can_be_planned(call.module)

    def _place(self, call: _Call) -> None:
        """Note which positions each call with blocks in it takes."""
        inner = [c for c in self.parts if _within(c.span, call.span)]
        if inner:
            call.position = inner[0].position[0], inner[-1].position[1]
        for below in call.calls:
            self._place(below)

    def _runs(self, call: _Call, found: Blocks) -> None:
        """Runs of a chain's children, and whole modules made of blocks."""
        writes = {block.position for block in found.blocks if block.writes}
        first, last = call.position
        whole = call not in self.parts and call.span.depth and self._usable(call) and not call.span.writes
        if whole and first and first < last:
            found.runs.append(Run(call.span.name, first, last))
        if call.module is not None and is_chain(call.module) and self._usable_chain(call):
            children = call.calls
            for i, begin in enumerate(children):
                if begin.span.writes or begin.position[0] in writes:
                    continue
                for j in range(i + 1, len(children)):
                    inner = [c for c in children[i : j + 1] if c.position[0]]
                    if len(inner) > 1 and not (i == 0 and j == len(children) - 1 and call.span.depth):
                        name = f"{call.span.name}[{i}:{j + 1}]"
                        found.runs.append(Run(name, inner[0].position[0], inner[-1].position[1]))
        for below in call.calls:
            if below not in self.parts:
                self._runs(below, found)

    def _usable_chain(self, call: _Call) -> bool:
        """Whether its calls are its children, each once."""
        if call.module is None or not (call.span.name in self.alone or not call.span.depth):
            return False
        prefix = f"{call.span.name}." if call.span.name else ""
        names = [f"{prefix}{name}" for name in call.module._modules]
        return [c.span.name for c in call.calls] == names and can_be_planned(call.module)


def _within(inner: Span, outer: Span) -> bool:
    return outer.events[0] <= inner.events[0] and inner.events[1] <= outer.events[1] and inner.depth >= outer.depth


def _some(runs: Sequence[Run]) -> list[Run]:
    """The runs, without duplicates; of too many those whose lengths are powers of two, and whole modules."""
    known: dict[tuple[int, int], Run] = {}
    for run in runs:
        known.setdefault((run.first, run.last), run)
    found = list(known.values())
    if len(found) <= MOST_RUNS:
        return found
    lengths = {2**k for k in range(20)} | {3 * 2**k for k in range(20)}
    return [run for run in found if not run.name.endswith("]") or ((run.last - run.first) // 2 + 1) in lengths]
