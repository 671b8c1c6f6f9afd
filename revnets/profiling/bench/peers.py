"""Ways to train one network with less memory, other software's beside ours: peak against step time, in one run.

Ours are another room's, above this one: it registers what makes them (see ``register_curve``).
"""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...training.errors import reason, refused
from ...training.options.values import COUNT, find_device
from ..compiled import backend_of
from ..fake import ProfileError
from ..memory import measure_training_step
from ..profile import resident_bytes
from ..target import Job, Setting, Target, parse_targets, set_mode
from ..turns import second_of_two

Turn = Callable[[], AbstractContextManager[nn.Module]]
"""Makes the context in which a step is run, of the model that it gives."""

SHARES = (0.75, 0.5, 0.25)
"""Of ``torch._functorch.config.activation_memory_budget``: 1 saves what is fastest, 0 recomputes everything."""


class NotHereError(ProfileError):
    """A way that this network or machine does not have; the message is the reason."""


@dataclass(frozen=True)
class Way:
    """One way to train a network.

    Attributes:
        name: of the kind of way.
        start: readies a job for it, before it takes turns with the others.
        detail: which one of its kind.
        theirs: other software, whose failure is noted and no mistake.
        compiles: for minutes.
        budget_bytes: that it was allowed.
        predicted_bytes: its peak, if it is known beforehand.
    """

    name: str
    start: Callable[[Job], Turn]
    detail: str = ""
    theirs: bool = False
    compiles: bool = False
    budget_bytes: int | None = None
    predicted_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.detail}" if self.detail else self.name


@dataclass(frozen=True)
class Row:
    """What a way costs.

    Attributes:
        model: name of the network.
        way: see ``Way.name``.
        budget_bytes: that the way was allowed; None for most.
        predicted_bytes: peak, as predicted; None where nothing predicts it.
        measured_bytes: peak of a whole training step, as measured: weights, buffers, input, gradients and the
            optimizer's state included.
        seconds: of a step without the optimizer's, median of an interleaved run; of the processor, on a CPU with one
            thread.
        ratio: of them to plain's.
        choices: see ``Way.detail``.
    """

    model: str
    way: str
    budget_bytes: int | None
    predicted_bytes: int | None
    measured_bytes: int
    seconds: float
    ratio: float
    choices: str = ""


@dataclass(frozen=True)
class Comparison:
    """All ways of one network.

    Attributes:
        target: the network, at a size and a batch.
        rows: what was measured.
        skipped: why not, by the way.
    """

    target: Target
    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)


# --- the ways --------------------------------------------------------------------------------------------------------


def _plain(job: Job) -> Turn:
    return lambda: nullcontext(job.model)


def _checkpointing(job: Job) -> Turn:
    if not set_mode(job.network, "checkpoint"):
        raise NotHereError("the network has no checkpointing of its own")
    _switch(job.network, False)

    @contextmanager
    def turn() -> Iterator[nn.Module]:
        _switch(job.network, True)
        try:
            yield job.model
        finally:
            _switch(job.network, False)

    return turn


def _switch(network: Any, on: bool) -> None:
    if hasattr(network, "set_mode"):
        network.set_mode("checkpoint" if on else "store")
    else:
        network.set_grad_checkpointing(on)


def _compiled(job: Job, share: float) -> Turn:
    compiled: Any = torch.compile(job.model, backend=backend_of(share), dynamic=False)
    return lambda: nullcontext(compiled)


def _offloaded(job: Job) -> Turn:
    kind = job.x.device.type
    if kind == "cpu":
        raise NotHereError("the network is on the CPU already: it is for accelerators")

    @contextmanager
    def turn() -> Iterator[nn.Module]:
        with torch.autograd.graph.save_on_cpu(pin_memory=True, device_type=kind):
            yield job.model

    return turn


PLAIN, CHECKPOINTING, COMPILED, OFFLOADED, PLANNED, COMPILED_PLAN = (
    "plain",
    "its own checkpointing",
    "torch.compile",
    "save_on_cpu",
    "plan",
    "compiled plan",
)

PEERS = [
    Way(PLAIN, _plain),
    Way(CHECKPOINTING, _checkpointing, theirs=True),
    *(
        Way(COMPILED, functools.partial(_compiled, share=s), f"activation_memory_budget={s:g}", True, True)
        for s in SHARES
    ),
    Way(OFFLOADED, _offloaded, "everything that autograd keeps", theirs=True),
]
"""What ours is compared with; the first is the reference."""

Curve = Callable[[Target, Setting, int, bool], tuple[int, list[Way]]]
"""From a network, a number of budgets, and whether plans may be by ``torch.compile``, too: plain's predicted peak, and
a way for each budget from the least to plain."""

CURVE = "revnets.budget.table"
"""Module that registers the curve when it is imported."""
_CURVES: dict[str, Curve] = {}


def register_curve(curve: Curve) -> Curve:
    """Have a function make the ways of ours."""
    _CURVES[curve.__module__] = curve
    return curve


def ways(
    target: Target, setting: Setting, budgets: int, compiled: bool = True, compiled_plans: bool = False
) -> list[Way]:
    """All ways to train a network: peers, and ours by their budgets.

    Args:
        target: the network, at a size and a batch.
        setting: of the step.
        budgets: from the least possible to plain.
        compiled: whether to compare with what compiles for minutes.
        compiled_plans: whether plans may be by ``torch.compile``, too.

    Raises:
        ProfileError: for a network that cannot be planned.
    """
    COUNT.check("budgets", budgets)
    importlib.import_module(CURVE)
    predicted, ours = _CURVES[CURVE](target, setting, budgets, compiled_plans)
    plain = Way(PLAIN, PEERS[0].start, predicted_bytes=predicted)
    return [plain, *(way for way in PEERS[1:] if compiled or not way.compiles), *ours]


def read_target(name: str, setting: Setting, batch_size: int = 8) -> Target:
    """The plain network of a name.

    Args:
        name: ``NAME[@SIZE][:BATCH]``.
        setting: of the network.
        batch_size: where the name has none.

    Raises:
        ProfileError: for what does not exist.
    """
    targets = [t for t in parse_targets(name, setting, None, batch_size) if t.mode == "store"]
    return targets[-1]


# --- measuring -------------------------------------------------------------------------------------------------------


def compare(
    target: Target,
    setting: Setting,
    chosen: Sequence[Way],
    repeats: int = 5,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Comparison:
    """Measure all ways on one model by turns: memory first, then rounds of two steps each, the second of which counts.

    Args:
        target: a network at a size and a batch.
        setting: of the step.
        chosen: the ways, the first of which is the reference.
        repeats: timed steps of each.
        progress: wraps the list of pieces of work, e.g. ``rich.progress.track``.

    Raises:
        ProfileError: for a network that does not run.
    """
    COUNT.check("repeats", repeats)
    find_device(setting.device, here=True)
    job = target.build(setting, setting.device)
    optimizer = setting.make_optimizer(job.model) if setting.optimizer is not None else None
    turns: dict[Way, Turn] = {}
    peaks: dict[Way, int] = {}
    seconds: dict[Way, list[float]] = {}
    skipped: dict[str, str] = {}
    try:
        for way, is_first in progress([(way, n == 0) for n in range(repeats + 1) for way in chosen]):
            if is_first:
                try:
                    with refused(f"{target} cannot run, {way}", kind=ProfileError):
                        turns[way] = way.start(job)
                        peaks[way] = _peak(turns[way], job, optimizer)
                    seconds[way] = []
                except ProfileError as error:
                    if not way.theirs:
                        raise
                    skipped[str(way)] = reason(error)
                    job.model.zero_grad(set_to_none=True)
            elif way in seconds:
                seconds[way].append(_timed(turns[way], job))
    finally:
        if any(way.compiles for way in chosen):
            torch._dynamo.reset()
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    reference = medians[chosen[0]]
    rows = [
        Row(
            target.title,
            way.name,
            way.budget_bytes,
            way.predicted_bytes,
            peaks[way],
            median,
            median / reference,
            way.detail,
        )
        for way, median in medians.items()
    ]
    return Comparison(target, rows, skipped)


def _peak(turn: Turn, job: Job, optimizer: torch.optim.Optimizer | None) -> int:
    with turn() as model:
        measured = measure_training_step(model, job.x, job.loss_fn, optimizer)
    return measured.peak_bytes + resident_bytes(job, optimizer)


def _timed(turn: Turn, job: Job) -> float:
    with turn() as model:
        return second_of_two(model, job.x, job.loss_fn, job.x.device)
