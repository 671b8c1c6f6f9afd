"""Plans of one training step for any budget: candidates from the integer program, each checked by a trace."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..profiling.fake import ProfileError
from ..profiling.fit import DoesNotFitError, largest
from ..profiling.predict import StepPrediction, summarize, traceable
from ..training.errors import reason
from .blocks import find_blocks
from .compiled import Compiled, Measure
from .plan import BlockPlan, Plan, Timeline
from .program import Program, Solution
from .step import Step, described, layout_of, reserve
from .watch import Figures, Watch, figures_of, machine_of

LEVELS = 200
"""Peaks between the least and the plain one for which choices are looked for: the same ones whatever the budget is, so
that a lower budget never gets a higher peak."""
SLACK = 1.01
"""The program's peaks are off by less; each is checked by a trace of the step with its choices."""
GENERATOR = 6_000
"""Bytes of the CPU's generator, whose state each checkpoint of a block that draws keeps beside it."""

_logger = logging.getLogger("revnets")


@dataclass(frozen=True)
class Tried:
    """Choices and the step that they make.

    Attributes:
        solution: the choices, and what the program expects of them.
        predicted: the step, traced; measured, if it is compiled.
        mode: of reversible parts.
    """

    solution: Solution
    predicted: StepPrediction | Compiled
    mode: str | None = None


@dataclass
class Planner:
    """Plans of one step for any budget; what is found out for one budget is there for the next.

    Attributes:
        step: that is planned.
        batch_size: of it, if it has one.
        within: names of the modules that may be blocks; by default all.
        measured: a function from a Watch and names of blocks to the seconds of their forward passes, if they were
            measured.
        compiled: measures compiled steps, if there may be plans by ``torch.compile``.
    """

    step: Step
    batch_size: int | None = None
    within: Collection[str] | None = None
    measured: Callable[[Sequence[str]], list[float]] | None = None
    compiled: Measure | None = None
    _tried: dict[Any, Tried] = field(default_factory=dict)
    _levels: dict[int, Solution | None] = field(default_factory=dict)
    _program: Program | None = None

    def __post_init__(self) -> None:
        self.mode = "store" if self.step.has_modes else None
        watch = self.step.watched({}, self.mode)
        self.blocks = find_blocks(self.step.network, watch, self.within)
        self.figures: dict[str, Figures] = {"store": figures_of(watch, self.blocks.names)}
        self.plain = self._knows(self._all("store"), watch)

    # --- what is looked at ---------------------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """The integer program, made when it is first needed."""
        if self._program is None:
            names = self.blocks.names
            again = [block.name for block in self.blocks.blocks if not block.writes]
            watches = {"lean": self._trace("lean", {"": "lean", **dict.fromkeys(names, "lean")})}
            if again:
                watches["checkpoint"] = self._trace("checkpoint", dict.fromkeys(again, "checkpoint"))
            if traceable(self.step.device).type != "cpu":
                watches["offload"] = self._trace("offload", dict.fromkeys(names, "offload"))
            self._calibrate()
            self._program = Program(self.blocks, self.figures, machine_of(self.step.device).link)
            for choice, watch in watches.items():
                if watch is not None:
                    self._knows(self._all(choice), watch)
        return self._program

    def _trace(self, choice: str, choices: dict[str, str]) -> Watch | None:
        try:
            watch = self.step.watched(choices, self.mode)
        except ProfileError as error:  # then no block gets this choice
            _logger.info(f"{choice} is no choice here: {reason(error)}")
            return None
        self.figures[choice] = figures_of(watch, self.blocks.names)
        return watch

    def _knows(self, solution: Solution, watch: Watch) -> Tried:
        """What the step of a solution takes, of which there is a trace."""
        predicted = summarize(watch.trace, sum(p.numel() for p in self.step.network.parameters()))
        return self._tried.setdefault((solution.choices, self.mode), Tried(solution, predicted, self.mode))

    def _calibrate(self) -> None:
        """Scale the seconds of each block so that its forward pass takes what was measured."""
        if self.measured is None:
            return
        seconds = self.measured(self.blocks.names)
        expected = self.figures["store"].forward_seconds
        factors = [m / e if e > 0 and m > 0 else 1.0 for m, e in zip(seconds, expected, strict=True)]
        for choice, f in self.figures.items():
            self.figures[choice] = replace(
                f,
                seconds=[s * k for s, k in zip(f.seconds, factors, strict=True)],
                forward_seconds=[s * k for s, k in zip(f.forward_seconds, factors, strict=True)],
            )

    def _all(self, choice: str) -> Solution:
        if choice == "store":
            f = self.figures["store"]
            return Solution(tuple((name, "store") for name in self.blocks.names), f.peak, 0.0)
        return self.program.uniform(choice)

    def _try(self, solution: Solution, mode: str | None = None) -> Tried:
        mode = mode or self.mode
        key = (solution.choices, mode)
        if key not in self._tried:
            choices = _as_plan(solution)
            self._tried[key] = Tried(solution, self.step.predicted(choices, mode), mode)
        return self._tried[key]

    # --- candidates ----------------------------------------------------------------------------------------------

    def _candidates(self, budget: int) -> Iterator[Tried]:
        """Plans that may be the fastest within a budget: down the ladder, then those in which all is alike."""
        within = self.needed(self._try(self._least)) <= budget  # else none of the ladder is: dear to find out
        most = SLACK * budget
        for index in range(LEVELS if within else 0, -1, -1):
            if self._level_peak(index) > most and index:
                continue
            solution = self._level(index)
            if solution is not None:
                tried = self._try(solution)
                yield tried
                above = self.needed(tried) - budget
                if above <= 0:
                    break  # those below are slower
                most = self._level_peak(index) - above / 2  # a trace of a large network takes seconds: not each level
        for choice in self.figures:
            if choice != "store":
                yield self._try(self._all(choice))
        if self.step.has_modes:
            yield from self._whole()

    def _whole(self) -> Iterator[Tried]:
        """The network's own modes, without choices."""
        store = self.figures["store"]
        for mode in ("reversible", "checkpoint"):
            choices = tuple((name, "store") for name in self.blocks.names)
            seconds = sum(store.forward_seconds)
            yield self._try(Solution(choices, 0.0, seconds), mode)

    @property
    def by_compiler(self) -> list[Tried]:
        """Plans by ``torch.compile``, which were measured."""
        return [] if self.compiled is None else self._by_compiler

    @cached_property
    def _by_compiler(self) -> list[Tried]:
        if self.measured is not None:
            _ = self.program  # with it, seconds are what was measured
        store = self.figures["store"]

        def tried(found: Compiled) -> Tried:
            choices = (("", f"compile:{found.share:g}"),)
            added = (found.ratio - 1) * store.total_seconds
            return Tried(Solution(choices, found.peak_bytes, added), found, self.mode)

        return [tried(found) for found in self.compiled(store, self.mode)]  # type: ignore[misc]

    def _level_peak(self, index: int) -> float:
        return self._least.peak + (self.plain.predicted.peak_bytes - self._least.peak) * index / LEVELS

    @cached_property
    def _least(self) -> Solution:
        return self.program.least()

    def _level(self, index: int) -> Solution | None:
        if index not in self._levels:
            self._levels[index] = self.program.fastest(self._level_peak(index)) if index else self._least
        return self._levels[index]

    def least(self) -> Tried:
        """The plan with the lowest peak."""
        return min(self._candidates(0), key=self.needed)

    def needed(self, tried: Tried) -> int:
        """The budget that it takes: its peak, and what predictions may miss."""
        return self._needed(tried, tried.predicted.peak_bytes)

    def _needed(self, tried: Tried, peak: int) -> int:
        again = sum(choice == "checkpoint" for _, choice in tried.solution.choices)
        generators = GENERATOR * (again + 1) if self.step.device.type == "cpu" and again else 0
        return math.ceil(peak / (1 - reserve(self.step.device))) + generators

    # --- the plan ------------------------------------------------------------------------------------------------

    def plan(self, budget: int, compiled: bool = True) -> Plan:
        """The fastest plan whose step takes at most so many bytes.

        Args:
            budget: bytes.
            compiled: whether it may be one by ``torch.compile``, if there are such plans.

        Raises:
            DoesNotFitError: when there is none.
        """
        plain = self.needed(self.plain) <= budget
        tried = [*(self.by_compiler if compiled else []), *([self.plain] if plain else self._candidates(budget))]
        fits = [t for t in tried if self.needed(t) <= budget]
        if not fits:
            raise self._does_not_fit(budget)
        best = min(fits, key=lambda t: (t.solution.seconds, t.predicted.peak_bytes))
        return self._plan(best, budget)

    def _does_not_fit(self, budget: int) -> DoesNotFitError:
        least = self.least()
        peak = min(map(self.needed, (least, *self.by_compiler)))
        batch = "" if self.batch_size is None else f", batch {self.batch_size},"
        message = (
            f"{self.step.title} on {described(self.step.inputs)}{batch} does not fit {budget:,} bytes: it needs at "
            f"least {peak:,}, {peak - budget:,} more"
        )
        return DoesNotFitError(f"{message}: {self._help(least, budget)}")

    def _help(self, least: Tried, budget: int) -> str:
        """What would fit: the largest batch, with steps of accumulation."""
        batch_size, x = self.batch_size, self.step.inputs
        if batch_size is None or batch_size == 1:
            return "raise the budget, or take smaller images"
        choices = _as_plan(least.solution)

        def need(n: int) -> int:
            if n >= batch_size:
                return budget + n
            smaller = torch.empty(n, *x.shape[1:], device="meta", dtype=x.dtype).to(memory_format=layout_of(x))
            try:
                predicted = self.step.predicted(choices, least.mode, smaller)
            except ProfileError:  # batch norms want more than one value
                return need(n + 1)
            return self._needed(least, predicted.peak_bytes)

        n = largest(need, budget)
        if n == 0:
            return f"a batch of 1 needs {need(1):,}, so raise the budget, take smaller images or a smaller network"
        steps = -(-batch_size // n)
        return f"batch {n} fits, and {steps} steps of accumulation make it {n * steps}"

    def _plan(self, tried: Tried, budget: int) -> Plan:
        store = self.figures["store"]
        setting = {
            "device": str(self.step.device),
            "amp_dtype": None if self.step.amp_dtype is None else str(self.step.amp_dtype).removeprefix("torch."),
        }
        return Plan(
            model=self.step.title,
            inputs=described(self.step.inputs),
            batch_size=self.batch_size,
            budget=budget,
            peak_bytes=tried.predicted.peak_bytes,
            plain_bytes=self.plain.predicted.peak_bytes,
            seconds=tried.solution.seconds,
            plain_seconds=store.total_seconds,
            blocks=tuple(self._blocks(tried)),
            mode=tried.mode,
            reads="lean" in dict(tried.solution.choices).values() and self.step.reads,
            setting=setting,
            before=timeline(self.plain.predicted),
            after=timeline(tried.predicted),
        )

    def _blocks(self, tried: Tried) -> Iterator[BlockPlan]:
        """What each block does, keeps and adds."""
        store = self.figures["store"]
        if isinstance(tried.predicted, Compiled):
            ((name, choice),) = tried.solution.choices
            yield BlockPlan(name, choice, sum(store.kept), tried.predicted.kept_bytes, tried.solution.seconds)
            return
        kept = dict(zip(self.blocks.names, range(1, 2 * len(self.blocks.names), 2), strict=True))
        candidates = {} if self._program is None else {(c.name, c.choice): c for c in self._program.candidates}
        for name, choice in tried.solution.choices:
            if not name:
                between = range(0, 2 * len(kept) + 1, 2)
                plain, now = (sum(self.figures[c].kept[p] for p in between) for c in ("store", choice))
                yield BlockPlan(name, choice, plain, now, float(self.program.seconds[-2]))
                continue
            c = candidates.get((name, choice))
            first, last = (c.first, c.last) if c is not None else (kept[name], kept[name])
            plain = sum(store.kept[p] for p in range(first, last + 1))
            yield BlockPlan(name, choice, plain, int(c.kept) if c else plain, c.seconds if c else 0.0)


def _as_plan(solution: Solution) -> dict[str, str]:
    blocks = tuple(BlockPlan(name, choice, 0, 0, 0.0) for name, choice in solution.choices)
    return Plan("", "", None, 0, 0, 0, 0.0, 0.0, blocks).choices


def timeline(predicted: StepPrediction | Compiled) -> Timeline:
    """What is in use over a step, in at most a thousand points, peaks kept."""
    if isinstance(predicted, Compiled):
        return predicted.timeline
    totals = [sum(now) for now in predicted.timeline]
    phases = predicted.phases
    stride = max(1, -(-len(totals) // 1000))
    coarse = tuple(max(totals[i : i + stride]) for i in range(0, len(totals), stride))
    starts = [phases.index(p) if p in phases else len(phases) for p in ("backward", "optimizer")]
    return Timeline(coarse, starts[0] // stride, starts[1] // stride)
