"""Which choice for which block: an integer program over the bytes at each moment of the step, solved by scipy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..profiling.fake import ProfileError
from .blocks import Block, Blocks, Run
from .watch import Figures

MEGABYTE = 1e6
GAP = 1e-3
"""Share of the seconds by which a choice may miss the best one."""
LONGEST = 20.0
"""Seconds for one choice; it is small, and takes a fraction of one."""


@dataclass(frozen=True)
class Candidate:
    """One choice for one block, or for blocks in a row; all bytes relative to what is in use before the first.

    Attributes:
        name: of the block or run; None for what lies between the blocks.
        choice: one of ``choices.CHOICES``.
        first: its first position.
        last: its last one.
        seconds: that it adds to a step in which everything is stored.
        kept: bytes it leaves in use after its forward pass.
        needs: by position and direction (``"forward"``, ``"backward"``), the most it has in use then.
    """

    name: str
    choice: str
    first: int
    last: int
    seconds: float
    kept: float
    needs: dict[tuple[int, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Solution:
    """What the program chose.

    Attributes:
        choices: by name of block or run, as ``choices.apply_choices`` takes them; ``""`` is lean where what lies
            between the blocks is.
        peak: bytes that it expects.
        seconds: that the choices add.
    """

    choices: tuple[tuple[str, str], ...]
    peak: float
    seconds: float


class Program:
    """The choices of a network's blocks as an integer program.

    Args:
        blocks: of the network.
        figures: of a step in which all blocks do the same, by choice; ``"store"`` is there, others may be missing.
        link: bytes per second to the CPU's memory, for blocks that are offloaded.
    """

    def __init__(self, blocks: Blocks, figures: Mapping[str, Figures], link: float = 1e10) -> None:
        self.blocks = blocks
        self.store = figures["store"]
        self.lean = figures.get("lean")
        self.again = figures.get("checkpoint")
        self.away, self.link = figures.get("offload"), link
        self.size = 2 * len(blocks.blocks) + 1
        self.candidates = [c for block in blocks.blocks for c in self._of_block(block)]
        if self.again is not None:
            self.candidates += [self._of_run(run, self.again) for run in blocks.runs]
        self._rows()

    # --- bytes and seconds -----------------------------------------------------------------------------------------

    def _uniform(self, name: str, choice: str, position: int, figures: Figures, more: float = 0.0) -> Candidate:
        before = figures.before(position)
        needs = {(position, "forward"): float(figures.forward[position] - before)}
        if figures.backward[position]:
            needs[position, "backward"] = float(figures.backward[position] - before)
        seconds = figures.seconds[position] - self.store.seconds[position]
        return Candidate(name, choice, position, position, max(seconds, 0.0) + more, figures.kept[position], needs)

    def _of_block(self, block: Block) -> list[Candidate]:
        found = [self._uniform(block.name, "store", block.position, self.store)]
        if self.lean is not None:
            found.append(self._uniform(block.name, "lean", block.position, self.lean))
        if self.again is not None and not block.writes:
            found.append(self._uniform(block.name, "checkpoint", block.position, self.again))
        if self.away is not None:
            moved = max(self.store.kept[block.position] - self.away.kept[block.position], 0)
            found.append(self._uniform(block.name, "offload", block.position, self.away, 2 * moved / self.link))
        return found

    def _of_run(self, run: Run, again: Figures) -> Candidate:
        """Of a run: it keeps its input, and when its turn comes it is computed again, storing everything."""
        store = self.store
        start, needs, inside = store.before(run.first), {}, 0.0
        end = store.before(run.last + 1)
        arriving = max(store.begun[run.last] - end, 0) if store.begun[run.last] else 0
        peak = 0.0
        for position in range(run.first, run.last + 1):
            needs[position, "forward"] = float(again.forward[position] - again.before(position)) + inside
            inside = max(float(again.kept[position]), 0.0)  # its output goes with the next block
            peak = max(peak, store.forward[position] - start + arriving)
            if store.backward[position]:
                needs[position, "backward"] = float(store.backward[position] - start)
        needs[run.last, "backward"] = max(needs.get((run.last, "backward"), 0.0), peak)
        seconds = sum(store.forward_seconds[run.first : run.last + 1])
        return Candidate(run.name, "checkpoint", run.first, run.last, seconds, again.kept[run.last], needs)

    # --- the program -----------------------------------------------------------------------------------------------

    def _rows(self) -> None:
        """One row per moment: what is in use, in megabytes, by the candidates that are chosen.

        After the candidates come columns for what a lean position hands to a block that stores it (see ``_handed``),
        whether what lies between the blocks is lean, and the peak.
        """
        store, lean, size = self.store, self.lean, self.size
        self.handed = [] if lean is None else [p for p in range(size - 1) if self._next(p) and lean.passed[p] > 0]
        count, width = len(self.candidates), len(self.candidates) + len(self.handed) + 2
        moments = [(p, way) for way in ("forward", "backward") for p in range(size)]
        table = np.zeros((len(moments) + 1, width))
        base = np.full(len(moments) + 1, float(store.optimizer))
        for row, (position, way) in enumerate(moments):
            used = store.forward[position] if way == "forward" else store.backward[position]
            if position % 2 == 0 and not used:
                base[row] = 0.0
                continue
            base[row] = store.resident + self._between(store, 0, position)
            if position % 2 == 0:
                base[row] += used - store.before(position)
            for column, c in enumerate(self.candidates):
                if c.first <= position <= c.last and (position, way) in c.needs:
                    table[row, column] = c.needs[position, way] - self._between(store, c.first, position)
                elif c.first <= position:
                    table[row, column] = c.kept
            if lean is not None:
                table[row, -2] = self._between(lean, 0, position) - self._between(store, 0, position)
                now = lean.forward[position] if way == "forward" else lean.backward[position]
                if position % 2 == 0 and now:
                    table[row, -2] += (now - lean.before(position)) - (used - store.before(position))
                for column, origin in enumerate(self.handed):
                    if position > origin:
                        table[row, count + column] = lean.passed[origin]
        self.table, self.base = table / MEGABYTE, base / MEGABYTE
        self.table[:, -1] = -1.0
        places = range(0, size, 2)
        apart = 0.0 if lean is None else sum(max(lean.seconds[p] - store.seconds[p], 0.0) for p in places)
        self.seconds = np.array([*(c.seconds for c in self.candidates), *[0.0] * len(self.handed), apart, 0.0])

    @staticmethod
    def _between(figures: Figures, first: int, position: int) -> int:
        """Bytes kept by what lies between the blocks, from a position up to another."""
        return sum(figures.kept[p] for p in range(first + first % 2, position, 2))

    @staticmethod
    def _next(position: int) -> int:
        """The position of the next block."""
        return position + 1 if position % 2 == 0 else position + 2

    def _handed(self) -> Any:
        """A lean block (or what lies between) drops what it hands on; the next block, if it stores, keeps it."""
        rows = []
        for column, origin in enumerate(self.handed):
            row = np.zeros(self.table.shape[1])
            row[len(self.candidates) + column] = -1.0
            for index, c in enumerate(self.candidates):
                if c.choice == "lean" and c.first == origin:
                    row[index] = 1.0
                if c.choice in ("store", "offload") and c.first == self._next(origin):
                    row[index] = 1.0
            if origin % 2 == 0:
                row[-2] = 1.0
            rows.append(row)
        return np.array(rows)

    def _partition(self) -> tuple[Any, Any]:
        """Each block has exactly one choice; where one is lean, so is what lies between: the last column but one."""
        width = self.table.shape[1]
        each = np.zeros((len(self.blocks.blocks), width))
        for column, c in enumerate(self.candidates):
            each[(c.first - 1) // 2 : (c.last - 1) // 2 + 1, column] = 1.0
        lean = [column for column, c in enumerate(self.candidates) if c.choice == "lean"]
        on = np.zeros((len(lean), width))
        for row, column in enumerate(lean):
            on[row, column], on[row, -2] = 1.0, -1.0
        return each, on

    def least(self) -> Solution:
        """The choices with the lowest peak."""
        found = self._solve(None)
        if found is None:  # any choice has a peak, so that one would have been found in time
            raise ProfileError(
                f"no plan was found for {len(self.candidates)} choices within {LONGEST} s; fit a part of the network"
            )
        return found

    def fastest(self, budget: float) -> Solution | None:
        """The fastest choices whose peak is at most a budget, in bytes; None where there are none."""
        return self._solve(budget)

    def _solve(self, budget: float | None) -> Solution | None:
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ImportError:
            raise ProfileError("a plan needs scipy, which solves the integer program: pip install scipy") from None
        width = self.table.shape[1]
        each, on = self._partition()
        limits = [LinearConstraint(self.table, -np.inf, -self.base), LinearConstraint(each, 1.0, 1.0)]
        if len(on):
            limits.append(LinearConstraint(on, -np.inf, 0.0))
        if self.handed:
            limits.append(LinearConstraint(self._handed(), -np.inf, 1.0))
        highest = np.inf if budget is None else budget / MEGABYTE
        whole = np.zeros(width)
        whole[: len(self.candidates)] = whole[-2] = 1.0
        goal = self.seconds / max(float(self.seconds.sum()), 1e-9) * 1e3
        size = float(self.base.max() + np.abs(self.table[:, :-1]).sum(axis=1).max())
        goal[-1] = 1e-3 / max(size, 1.0)  # of equally fast choices the one with the lower peak
        if budget is None:
            goal, goal[-1] = goal * 1e-6, 1.0
        bounds = Bounds(np.zeros(width), np.array([*np.ones(width - 1), highest]))
        if self.lean is None:
            bounds.ub[-2] = 0.0
        options = {"mip_rel_gap": GAP, "time_limit": LONGEST}
        found = milp(goal, constraints=limits, integrality=whole, bounds=bounds, options=options)
        if found.x is None:
            return None
        return self._solution([c for c, take in zip(self.candidates, found.x, strict=False) if take > 0.5], found.x[-2])

    def _solution(self, chosen: list[Candidate], rest: float) -> Solution:
        column = np.zeros(self.table.shape[1])
        place = {id(c): index for index, c in enumerate(self.candidates)}
        for c in chosen:
            column[place[id(c)]] = 1.0
        column[-2] = float(rest > 0.5)
        if self.handed:
            count = len(self.candidates)
            column[count:-2] = self._handed() @ column > 1.5
        peak = float((self.table @ column + self.base).max()) * MEGABYTE
        choices = [(c.name, c.choice) for c in sorted(chosen, key=lambda c: c.first)]
        head = [("", "lean")] if rest > 0.5 else []
        return Solution((*head, *choices), peak, float(self.seconds @ column))

    def uniform(self, choice: str) -> Solution:
        """All blocks alike, as far as they can be."""
        chosen = []
        for block in self.blocks.blocks:
            own = [c for c in self.candidates if c.first == c.last == block.position]
            chosen.append(next((c for c in own if c.choice == choice), own[0]))
        return self._solution(chosen, choice == "lean")
