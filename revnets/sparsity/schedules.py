"""How masks change in training: when, how many weights, and which. Pure functions of tensors and numbers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCHEDULES = ("static", "set", "rigl")
"""``static`` keeps its masks; ``set`` grows at random (1707.04780), ``rigl`` by gradient (1911.11134)."""


@dataclass(frozen=True)
class Schedule:
    """When masks change, and what share of the active weights is exchanged then.

    At step ``t``, from ``start`` to before ``end``, every ``interval`` steps, the share ``drop_fraction`` decays as
    ``0.5 * (1 + cos(pi * (t - start) / (end - start)))`` (RigL, 1911.11134, section 3).

    Args:
        name: ``static``, ``set`` or ``rigl``.
        total_steps: optimizer steps of the whole training; only ``static`` does without.
        interval: steps between two changes.
        start: of the changes, as a fraction of the training.
        end: of the changes, as a fraction of the training.
        drop_fraction: share of the active weights that is exchanged at the start.

    Raises:
        ValueError: for an unknown name, a number out of range, or an end that is not after the start.

    Example:
        >>> schedule = Schedule("rigl", total_steps=1000)
        >>> [t for t in range(1, 1001) if schedule.due(t)]
        [100, 200, 300, 400, 500, 600, 700]
        >>> round(schedule.fraction(375), 3)
        0.15
    """

    name: str
    total_steps: int | None = None
    interval: int = 100
    start: float = 0.0
    end: float = 0.75
    drop_fraction: float = 0.3

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule={self.name!r}: expected one of {', '.join(SCHEDULES)}")
        if self.total_steps is None and self.name != "static":
            raise ValueError(f"total_steps=None: {self.name} needs the number of optimizer steps of the whole training")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps={self.total_steps}: expected at least 1")
        if self.interval < 1:
            raise ValueError(f"interval={self.interval}: expected at least 1 step between two changes of the masks")
        if not 0 < self.drop_fraction <= 1:
            raise ValueError(f"drop_fraction={self.drop_fraction}: expected more than 0 and at most 1, such as 0.3")
        if not (0 <= self.start <= 1 and 0 <= self.end <= 1):
            raise ValueError(f"start={self.start}, end={self.end}: expected fractions of the training from 0 to 1")
        if self.end <= self.start:
            raise ValueError(
                f"end={self.end}: the masks would stop changing before they start (start={self.start}); "
                "give an end after the start, or schedule='static'"
            )

    @property
    def first(self) -> int:
        """The step after which the clock of the changes starts."""
        return round(self.start * (self.total_steps or 0))

    @property
    def last(self) -> int:
        """The step from which on masks stay."""
        return round(self.end * (self.total_steps or 0))

    def due(self, step: int) -> bool:
        """Whether masks change after the optimizer's step number ``step`` (from 1)."""
        inside = self.name != "static" and self.first < step < self.last
        return inside and (step - self.first) % self.interval == 0

    def fraction(self, step: int) -> float:
        """Share of the active weights that is exchanged after step ``step``."""
        progress = (step - self.first) / max(self.last - self.first, 1)
        return self.drop_fraction * 0.5 * (1 + math.cos(math.pi * progress))

    def updates(self, steps: int) -> int:
        """How many times masks have changed after ``steps`` steps."""
        return 0 if self.name == "static" else max(min(steps, self.last - 1) - self.first, 0) // self.interval


def exchanged(active: int, numel: int, fraction: float) -> int:
    """How many weights of a layer are dropped and grown: ``floor(fraction * active)``, at most the free places.

    Example:
        >>> exchanged(25, 100, 0.3), exchanged(95, 100, 0.3), exchanged(100, 100, 0.3)
        (7, 5, 0)
    """
    return min(math.floor(fraction * active), numel - active)


@torch.no_grad()
def drop(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask without the ``count`` active weights of smallest magnitude.

    Args:
        weight: any shape.
        mask: of its shape.
        count: at most the number of active weights.

    Example:
        >>> drop(torch.tensor([3.0, -1.0, 2.0, 0.0]), torch.tensor([True, True, True, False]), 1)
        tensor([ True, False,  True, False])
    """
    flat = mask.reshape(-1)
    active = flat.nonzero().squeeze(1)  # a quarter of the numbers to look through, say
    smallest = weight.reshape(-1)[active].abs().topk(count, largest=False, sorted=False).indices
    dropped = active[smallest]
    return flat.index_fill(0, dropped, False).view(mask.shape)


@torch.no_grad()
def grow(kept: Tensor, scores: Tensor, count: int) -> Tensor:
    """The mask with the ``count`` places of largest score added that it does not hold.

    As in RigL's algorithm 1, what was just dropped may grow again; it then starts at 0 like all others.

    Args:
        kept: mask after ``drop``.
        scores: of its shape; infinite ones come first, NaN counts as 0.
        count: at most the number of places left.

    Example:
        >>> grow(torch.tensor([True, False, False]), torch.tensor([9.0, 1.0, 2.0]), 1)
        tensor([ True, False,  True])
    """
    free = torch.nan_to_num(scores, nan=0.0, posinf=math.inf).masked_fill(kept, -1.0).reshape(-1)
    return kept.reshape(-1).index_fill(0, free.topk(count, sorted=False).indices, True).view(kept.shape)
