"""Budgets from the least possible to plain, as ways to train a network that are measured beside those of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..profiling.bench.peers import COMPILED_PLAN, PLANNED, Turn, Way, register_curve
from ..profiling.fake import ProfileError
from ..profiling.target import Job, Setting, Target
from ..training.options.values import COUNT, find_device
from .compiled import Progress, measured_compiled
from .plan import Plan
from .planner import Planner
from .step import Step


def planner_of(
    target: Target, setting: Setting, amp: str | None = None, compiled: bool = False, progress: Progress = iter
) -> Planner:
    """The planner of a target's training step.

    Args:
        target: a network at a size and a batch.
        setting: without autocast.
        amp: that it is autocast to.
        compiled: whether plans may be by ``torch.compile``, too: the network is made and run on its device.
        progress: wraps what is compiled.
    """
    try:
        job = target.build(setting, "meta")
    except (NotImplementedError, RuntimeError, ProfileError):  # its constructor looks at values
        job = target.build(setting, "cpu")
    optimizer = setting.make_optimizer if setting.optimizer is not None else None
    step = Step(job.network, job.x, amp, optimizer, job.loss_fn, setting.device)
    planner = Planner(step, target.batch_size, getattr(job.network, "names", None))  # of a detector's own modules
    if compiled:
        find_device(setting.device, here=True)
        if hasattr(job.network, "names"):
            raise ProfileError(f"--compile: {target} is a detector, whose steps depend on values: plan it without")
        planner.compiled = measured_compiled(target.build(setting, setting.device).network, step, progress=progress)
    return planner


@register_curve
def curve(target: Target, setting: Setting, count: int = 10, compiled: bool = False) -> tuple[int, list[Way]]:
    """Plain's predicted peak, and plans for budgets from the least possible to plain, in equal steps.

    Args:
        target: a network at a size and a batch.
        setting: of the step.
        count: budgets.
        compiled: whether there are plans by ``torch.compile``, too: one for each share that is chosen for a budget.

    Raises:
        ProfileError: for a network that cannot be planned.
    """
    COUNT.check("count", count)
    planner = planner_of(target, replace(setting, amp_dtype=None), setting.amp_dtype, compiled)
    least, most = planner.needed(planner.least()), planner.needed(planner.plain)
    shares = [k / max(count - 1, 1) for k in range(count)]
    budgets = [int(least + share * (most - least)) for share in shares]
    found = [way_of(planner.plan(budget, compiled=False)) for budget in budgets]
    if compiled:
        budgets += map(planner.needed, planner.by_compiler)  # at each of these one share just fits
        plans = map(planner.plan, sorted(budgets, reverse=True))
        by_choice = {plan.blocks[0].choice: plan for plan in plans if plan.is_compiled}
        found += [way_of(plan, COMPILED_PLAN) for plan in by_choice.values()]
    return planner.plain.predicted.peak_bytes, found


def way_of(plan: Plan, name: str = PLANNED) -> Way:
    """A plan as a way to train the network that it was made for."""

    def start(job: Job) -> Turn:
        network: nn.Module = getattr(job.network, "detector", job.network)

        @contextmanager
        def turn() -> Iterator[nn.Module]:
            plan.apply(network)
            try:
                yield job.model
            finally:
                plan.undo(network)

        return turn

    sizes: dict[str, Any] = {"budget_bytes": plan.budget, "predicted_bytes": plan.peak_bytes}
    return Way(name, start, in_short(plan), compiles=plan.is_compiled, **sizes)


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
        if block.name or len(plan.blocks) == 1:
            counts[block.choice] = counts.get(block.choice, 0) + 1
    mode = [plan.mode] if plan.mode is not None and plan.mode != "store" else []
    return ", ".join([*mode, *(f"{n} {choice}" for choice, n in counts.items())])
