"""What each part of our work gives: the same training step with one thing left out."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from ...layers import lean_layers
from ...reversible import AdditiveCoupling, Parallel, ReversibleOp, RevSilo, SpaceToDepth
from ..target import Job, Setting, Target

AS_IT_IS = "as it is"
COMPILED = "compiled branches"


@dataclass(frozen=True)
class Variant:
    """One thing left out, or added.

    Attributes:
        change: of the setting.
        prepare: what is done to the model once built.
        active: context of its building and of all its steps.
    """

    change: Callable[[Setting], Setting] = lambda setting: setting
    prepare: Callable[[Any], object] = lambda model: None
    active: Callable[[], AbstractContextManager[None]] = nullcontext

    def build(self, target: Target, setting: Setting) -> Job:
        """The step of the variant on the setting's device."""
        changed = self.change(setting)
        job = target.build(changed, changed.device)
        self.prepare(job.network)
        return job


@contextmanager
def _textbook_backward() -> Iterator[None]:
    """Every branch is evaluated twice in the backward pass: for the inverse, and again for its gradient."""
    ops: tuple[type[ReversibleOp], ...] = (AdditiveCoupling, RevSilo, Parallel)
    own = [op.rewind for op in ops]
    for op in ops:
        op.rewind = ReversibleOp.rewind  # type: ignore[method-assign]
    try:
        yield
    finally:
        for op, rewind in zip(ops, own, strict=True):
            op.rewind = rewind  # type: ignore[method-assign]


def _store_ends(model: Any) -> None:
    model.neck.mode = model.head.mode = "store"


def _contiguous_inside(model: Any) -> None:
    for op in model.body.ops:
        if isinstance(op, SpaceToDepth):
            op.channels_last = False


VARIANTS: dict[str, Variant] = {
    AS_IT_IS: Variant(),
    "branches evaluated twice": Variant(active=_textbook_backward),
    "plain layers": Variant(active=lambda: lean_layers(False)),
    "neck and head stored": Variant(prepare=_store_ends),
    "contiguous": Variant(change=lambda setting: replace(setting, channels_last=False), prepare=_contiguous_inside),
    "exact=False": Variant(change=lambda setting: replace(setting, exact=False)),
    COMPILED: Variant(prepare=lambda model: model.compile_branches()),
}
"""By name. The first is the reference, the last adds something, those between take something away."""
