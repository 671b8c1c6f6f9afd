"""Budgets from the least possible to plain, planned and measured beside plain training and timm's checkpointing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..profiling.fake import ProfileError
from ..profiling.memory import measure_training_step, synchronize
from ..profiling.profile import describe, resident_bytes
from ..profiling.target import Job, Setting, Target, parse_targets
from ..training.files import write_csv
from ..training.options.values import COUNT, find_device
from ..training.pictures import caption, picture
from .plan import Plan
from .planner import Planner
from .step import Step

PLAIN, CHECKPOINTING, PLANNED = "plain", "its own checkpointing", "plan"


@dataclass(frozen=True)
class Row:
    """One way to train a network.

    Attributes:
        model: name.
        way: plain, its own checkpointing, or a plan.
        budget_bytes: that the plan was allowed; None for others.
        predicted_bytes: peak, as predicted.
        measured_bytes: peak, as measured.
        seconds: of a step without the optimizer's, median of an interleaved run; of the processor, on a CPU with one
            thread.
        ratio: of them to plain's.
        choices: of a plan, in short.
    """

    model: str
    way: str
    budget_bytes: int | None
    predicted_bytes: int | None
    measured_bytes: int
    seconds: float
    ratio: float
    choices: str = ""


def read_target(name: str, setting: Setting, batch_size: int) -> Target:
    """The network of a name, as it is without a plan.

    Raises:
        ProfileError: for what does not exist.
    """
    targets = [t for t in parse_targets(name, setting, None, batch_size) if t.mode == "store"]
    return targets[-1]


def planner_of(target: Target, setting: Setting, amp: str | None = None) -> Planner:
    """The planner of a target's training step.

    Args:
        target: a network at a size and a batch.
        setting: without autocast.
        amp: that it is autocast to.
    """
    try:
        job = target.build(setting, "meta")
    except (NotImplementedError, RuntimeError, ProfileError):  # its constructor looks at values
        job = target.build(setting, "cpu")
    optimizer = setting.make_optimizer if setting.optimizer is not None else None
    step = Step(job.network, job.x, amp, optimizer, job.loss_fn, setting.device)
    return Planner(
        step, target.batch_size, getattr(job.network, "names", None)
    )  # a detector's: those of its own modules


def sweep(target: Target, setting: Setting, count: int = 10, repeats: int = 5) -> list[Row]:
    """Plans for budgets from the least possible to plain, in equal steps, and what each costs here.

    All are measured on one model in turn: memory first, then ``repeats`` rounds in which each takes one timed step.

    Args:
        target: a network at a size and a batch.
        setting: of the step.
        count: budgets.
        repeats: timed steps of each.

    Raises:
        ProfileError: for a network that cannot be planned or does not run.
    """
    COUNT.check("count", count)
    find_device(setting.device, here=True)
    planner = planner_of(target, setting)
    least, most = planner.needed(planner.least()), planner.needed(planner.plain)
    shares = [k / max(count - 1, 1) for k in range(count)]
    plans = [planner.plan(int(least + share * (most - least))) for share in shares]
    job = target.build(setting, setting.device)
    network = getattr(job.network, "detector", job.network)
    ways = [_Way(PLAIN, None, network), *(_Way(PLANNED, plan, network) for plan in plans)]
    if any(t.mode == "checkpoint" for t in _modes(target, setting)) and network is job.network:
        ways.append(_Way(CHECKPOINTING, None, network))
    optimizer = setting.make_optimizer(job.model) if setting.optimizer is not None else None
    memory = [_peak(way, job, optimizer) for way in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, taken in zip(ways, seconds, strict=True):
            taken.append(_timed(way, job))
    medians = [statistics.median(taken) for taken in seconds]
    return [
        Row(
            target.title,
            way.name,
            None if way.plan is None else way.plan.budget,
            way.plan.peak_bytes if way.plan is not None else planner.plain.predicted.peak_bytes if index == 0 else None,
            peak,
            median,
            median / medians[0],
            "" if way.plan is None else in_short(way.plan),
        )
        for index, (way, peak, median) in enumerate(zip(ways, memory, medians, strict=True))
    ]


def in_short(plan: Plan) -> str:
    """How often each choice was made.

    Example:
        >>> from .plan import BlockPlan
        >>> blocks = (BlockPlan("a", "lean", 0, 0, 0.0), BlockPlan("b", "lean", 0, 0, 0.0))
        >>> in_short(Plan("Net", "", 1, 0, 0, 0, 0.0, 0.0, blocks))
        '2 lean'
    """
    counts: dict[str, int] = {}
    for block in plan.blocks:
        if block.name:
            counts[block.choice] = counts.get(block.choice, 0) + 1
    mode = [plan.mode] if plan.mode is not None and plan.mode != "store" else []
    return ", ".join([*mode, *(f"{n} {choice}" for choice, n in counts.items())])


@dataclass
class _Way:
    name: str
    plan: Plan | None
    network: nn.Module

    def __enter__(self) -> None:
        if self.plan is not None:
            self.plan.apply(self.network)
        elif self.name == CHECKPOINTING:
            self._checkpoint(True)
        else:
            self._store()

    def __exit__(self, *exc: Any) -> None:
        if self.plan is not None:
            self.plan.undo(self.network)
        elif self.name == CHECKPOINTING:
            self._checkpoint(False)

    def _store(self) -> None:
        network: Any = self.network
        if hasattr(network, "set_mode"):
            network.set_mode("store")

    def _checkpoint(self, on: bool) -> None:
        network: Any = self.network
        if hasattr(network, "set_mode"):
            network.set_mode("checkpoint" if on else "store")
        else:
            network.set_grad_checkpointing(on)


def _modes(target: Target, setting: Setting) -> Sequence[Target]:
    if type(target) is not Target:
        return []
    return parse_targets(f"{target.name}@{target.img_size}:{target.batch_size}", setting)


def _peak(way: _Way, job: Job, optimizer: torch.optim.Optimizer | None) -> int:
    with way:
        measured = measure_training_step(job.model, job.x, job.loss_fn, optimizer)
    return measured.peak_bytes + resident_bytes(job, optimizer)


def _timed(way: _Way, job: Job) -> float:
    with way:
        job.model.zero_grad(set_to_none=True)
        synchronize(job.x.device)
        # one thread's own time does not depend on what else the machine does
        now = time.process_time if job.x.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        start = now()
        job.loss_fn(job.model(job.x)).backward()
        synchronize(job.x.device)
        seconds = now() - start
        job.model.zero_grad(set_to_none=True)
    return seconds


# --- what is shown ---------------------------------------------------------------------------------------------------


def print_rows(rows: Sequence[Row], target: Target, setting: Setting) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{target}: budgets of one training step, MB of 10^6 bytes ({describe(setting)})")
    for column in ("way", "budget", "planned peak", "measured peak", "off", "step, s", "x plain", "choices"):
        table.add_column(column, justify="left" if column in ("way", "choices") else "right")
    for row in rows:
        off = "" if row.predicted_bytes is None else f"{100 * (row.measured_bytes / row.predicted_bytes - 1):+.2f}%"
        sizes = (_mb(row.budget_bytes), _mb(row.predicted_bytes), _mb(row.measured_bytes), off)
        table.add_row(row.way, *sizes, f"{row.seconds:.3f}", f"{row.ratio:.2f}", row.choices)
    Console(width=170).print(table)


def save(rows: Sequence[Row], target: Target, folder: Path) -> list[Path]:
    """The rows as ``NAME.csv``, and their curve as ``NAME.png`` where matplotlib is installed."""
    name = target.title.replace(" ", "_")
    written = [write_csv(folder / f"{name}.csv", [asdict(row) for row in rows])]
    drawn = draw(rows, str(target), folder / f"{name}.png")
    return written if drawn is None else [*written, drawn]


def draw(rows: Sequence[Row], title: str, path: Path) -> Path | None:
    """Measured peak against time of a step: the curve of plans, and the points of the others."""

    def points(way: str) -> list[tuple[float, float]]:
        return [(row.measured_bytes / 1e6, row.ratio) for row in rows if row.way == way]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(*zip(*sorted(points(PLANNED)), strict=True), "o-", label="plans, by budget")
        for way, marker in ((PLAIN, "s"), (CHECKPOINTING, "^")):
            if found := points(way):
                axes.plot(*zip(*found, strict=True), marker, markersize=9, label=way)
        axes.set(title=caption(title), xlabel="measured peak of a training step, MB", ylabel="time of a step, x plain")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")

    return picture(path, (6.5, 4.5), paint)


def _mb(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:,.1f}"
