"""A plan as a table, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..training.pictures import caption, picture

WORDS = {
    "store": "keeps what autograd needs",
    "lean": "computes norms, activations and sums again",
    "checkpoint": "keeps its input, computes all else again",
    "offload": "keeps it in the CPU's memory",
    "compile": "torch's compiler decides, within this share of what is fastest to keep",
}

REST, WHOLE = "all the rest", "the network"


def plan_table(plan: Any) -> str:
    """A plan (see ``plan.Plan``) in words and numbers."""
    batch = "" if plan.batch_size is None else f", batch {plan.batch_size}"
    lines = [
        f"{plan.model} on {plan.inputs}{batch}: peak {_mb(plan.peak_bytes)} of {_mb(plan.budget)} MB, "
        f"plain {_mb(plan.plain_bytes)} MB (weights, gradients, optimizer state and activations; 1 MB = 10^6 bytes)",
        f"added to a step: {_share(plan.seconds, plan.plain_seconds)} of its time"
        + (f"; reversible parts: {plan.mode}" if plan.mode is not None else ""),
    ]
    width = max([len(block.name) for block in plan.blocks] + [len(REST)])
    lines.append(f"{'block':{width}}  {'choice':12}  {'keeps MB':>9}  {'plain MB':>9}  {'adds ms':>8}")
    rest = WHOLE if len(plan.blocks) == 1 else REST
    for b in plan.blocks:
        sizes = f"{_mb(b.kept_bytes):>9}  {_mb(b.plain_bytes):>9}"
        lines.append(f"{b.name or rest:{width}}  {b.choice:12}  {sizes}  {1e3 * b.seconds:8.1f}")
    chosen = {block.choice.partition(":")[0] for block in plan.blocks}
    lines += [f"{choice}: {words}" for choice, words in WORDS.items() if choice in chosen]
    return "\n".join(lines)


def draw_plan(plan: Any, path: Path) -> Path:
    """What is in use over the step, without the plan and with it, and the budget.

    Raises:
        ValueError: without matplotlib.
    """

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        for label, timeline, color in (("plain", plan.before, "C7"), ("with the plan", plan.after, "C0")):
            length = max(len(timeline.nbytes) - 1, 1)
            x = [index / length for index in range(len(timeline.nbytes))]
            peak = max(timeline.nbytes, default=0)
            axes.plot(x, [n / 1e6 for n in timeline.nbytes], color=color, label=f"{label}: {_mb(peak)} MB", linewidth=1)
            axes.axvline(timeline.backward / length, color=color, linewidth=0.8, linestyle=":")
        axes.axhline(plan.budget / 1e6, color="C3", linewidth=1, label=f"budget: {_mb(plan.budget)} MB")
        batch = "" if plan.batch_size is None else f", batch {plan.batch_size}"
        axes.set(
            title=caption(f"{plan.model}{batch}: predicted"),
            xlabel="a training step, by allocations (dotted: the backward pass begins)",
            ylabel="in use, MB",
            ylim=(0, None),
        )
        axes.legend(loc="upper right", fontsize="small")

    if picture(path, (8, 4.5), paint) is None:
        raise ValueError("pictures need matplotlib: pip install 'revnets[quickstart]'")
    return path


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "0%"
