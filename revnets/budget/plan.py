"""A plan: what each block of a network keeps, so that a training step stays within so many bytes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..layers.lean.network import plan_in, put_plan
from ..training.errors import reason, refused
from ..training.files import write_json
from .choices import (
    BudgetError,
    apply_choices,
    check_changeable,
    check_choice,
    is_planned,
    modes_of,
    put_modes,
    remove_choices,
    share_of,
)

FORMAT = 1


@dataclass(frozen=True)
class BlockPlan:
    """The choice for one block, or for blocks in a row.

    Attributes:
        name: of the module, or of a run of a Sequential's children, such as ``layer1[0:2]``; ``""`` is what lies
            between the blocks.
        choice: see ``choices.CHOICES``.
        plain_bytes: that it keeps for its backward pass when nothing is chosen.
        kept_bytes: that it keeps now.
        seconds: that the choice adds to a step, by the speeds that were assumed or measured.
    """

    name: str
    choice: str
    plain_bytes: int
    kept_bytes: int
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """Bytes in use over a step, from first allocation to last.

    Attributes:
        nbytes: after allocations, in order.
        backward: index at which the backward pass begins.
        optimizer: index at which the optimizer's step begins; the length without one.
    """

    nbytes: tuple[int, ...]
    backward: int
    optimizer: int


@dataclass(frozen=True)
class Plan:
    """What ``fit`` found; printed, it is a table.

    Attributes:
        model: name of the network's class.
        inputs: its inputs in words.
        batch_size: of the step; None where inputs were given as they are.
        budget: bytes that were allowed.
        peak_bytes: most bytes in use at any moment of the step with this plan: weights, buffers, gradients, optimizer
            state, input, activations and what kernels take for a moment.
        plain_bytes: the same without it.
        seconds: that the plan adds to a step.
        plain_seconds: of a step without it, by the same speeds.
        blocks: in the order of the step.
        mode: of the network's reversible parts, if it has any.
        reads: whether lean blocks read their recipes from autograd's graph, rather than look at every operator.
        setting: device, precision and optimizer that it holds for.
        before: timeline without the plan.
        after: timeline with it.
    """

    model: str
    inputs: str
    batch_size: int | None
    budget: int
    peak_bytes: int
    plain_bytes: int
    seconds: float
    plain_seconds: float
    blocks: tuple[BlockPlan, ...]
    mode: str | None = None
    reads: bool = False
    setting: dict[str, Any] = dataclasses.field(default_factory=dict)
    before: Timeline = Timeline((), 0, 0)
    after: Timeline = Timeline((), 0, 0)

    @property
    def choices(self) -> dict[str, str]:
        """By the name of the block, as ``apply_choices`` takes them; ``""`` is the network itself."""
        found = {block.name: block.choice for block in self.blocks}
        if "lean" in found.values():
            return found
        return {name: choice for name, choice in found.items() if choice != "store"}

    @property
    def is_compiled(self) -> bool:
        """Whether torch's compiler makes the network's kernels, and decides what is kept."""
        return any(share_of(block.choice) is not None for block in self.blocks)

    def apply(self, model: nn.Module) -> nn.Module:
        """Let a network train by this plan, in place: its class and weights stay, each block does as chosen.

        Args:
            model: as the plan was made for: neither wrapped nor compiled yet. An earlier plan gives way to this one.

        Raises:
            BudgetError: for another network; it is left as it was.
        """
        check_changeable(model)
        former = undone(model)
        try:
            modes = modes_of(model)
            apply_choices(model, self.choices, self.mode, self.reads)
        except Exception:
            former()
            raise
        model.__dict__["_budget_modes"] = modes
        return model

    def undo(self, model: nn.Module) -> nn.Module:
        """Make a network plain again, in place."""
        undone(model)
        return model

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        return write_json(Path(path), {"format": FORMAT, **dataclasses.asdict(self)})

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            BudgetError: for a file that holds none.
        """
        with refused(f"{str(path)!r} holds no plan", "make one with revnets.fit(...).save(...)", kind=BudgetError):
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return _read(found)

    def draw(self, path: str | Path) -> Path:
        """Draw what is in use over the step, before and after, as a PNG.

        Raises:
            ValueError: without matplotlib.
        """
        from .pictures import draw_plan

        return draw_plan(self, Path(path))

    def __str__(self) -> str:
        from .pictures import plan_table

        return plan_table(self)


def undone(model: nn.Module) -> Any:
    """Remove the plan that a network has, if it has one; the function that puts it back."""
    planned = [(m, type(m), vars(m).get("_budget"), plan_in(m)) for m in model.modules() if is_planned(m)]
    now, before = modes_of(model), model.__dict__.pop("_budget_modes", None)
    remove_choices(model)
    if before is not None:
        put_modes(model, before)

    def put_back() -> None:
        for module, kind, how, lean_plan in planned:
            module.__class__ = kind
            module.__dict__["_budget"] = how
            put_plan(module, lean_plan)
        if before is not None:
            model.__dict__["_budget_modes"] = before
            put_modes(model, now)

    return put_back


def _read(found: Any) -> Plan:
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise ValueError(f"expected a mapping with format {FORMAT}")
    blocks = tuple(BlockPlan(**block) for block in found.pop("blocks"))
    for block in blocks:
        if not isinstance(block.name, str) or not isinstance(block.choice, str):
            raise ValueError(f"block {block.name!r} has the choice {block.choice!r}: expected two texts")
        check_choice(block.name, block.choice)
    if not isinstance(found.get("reads", False), bool):
        raise ValueError(f"reads is {found['reads']!r}: expected true or false")
    before, after = (
        Timeline(tuple(t["nbytes"]), t["backward"], t["optimizer"]) for t in (found.pop("before"), found.pop("after"))
    )
    try:
        return Plan(blocks=blocks, before=before, after=after, **found)
    except TypeError as error:
        raise ValueError(reason(error)) from None
