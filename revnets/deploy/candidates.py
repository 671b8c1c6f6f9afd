"""Files that may become the deployed one: what is known of each, and which is the fastest that may be taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..profiling.turns import rounds
from .graph import ExportError
from .lower import Layer
from .runners import Runner

FLOAT32, INT8 = "float32", "int8"
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
_WARM_SECONDS = 0.06
_CLOSE, _REPEATS_OF_CLOSE = 1.05, 3  # of times that differ by less, how many times as many runs are counted


@dataclass
class Candidate:
    """A file that may become the deployed one.

    Attributes:
        engine: that runs it.
        precision: that it computes in.
        path: of the file; None where it could not be made.
        run: the file, opened.
        error: largest difference from the model's outputs, relative to the largest; in INT8 the root mean square.
        layers: of the engine ``sparse``: what became of each.
        seconds: of a call on the example input, the least of some; NaN where it was not timed.
        accuracy: top-1 in percent, where it was measured.
        refused: why it cannot be taken; empty where it can.
    """

    engine: str
    precision: str
    path: Path | None
    run: Runner | None = field(default=None, repr=False)
    error: float = 0.0
    layers: tuple[Layer, ...] = ()
    seconds: float = math.nan
    accuracy: float | None = None
    refused: str = ""

    @property
    def name(self) -> str:
        """Engine, and precision where it is another than float32."""
        return self.engine if self.precision == FLOAT32 else f"{self.engine} {self.precision}"

    @property
    def dense(self) -> bool:
        """Whether zeros are multiplied like all numbers."""
        return self.engine != "sparse"


def attempt(make: Callable[[], Candidate], engine: str, precision: str) -> Candidate:
    """The candidate, or one that is refused with the reason why it could not be made."""
    try:
        return make()
    except ExportError as error:
        return Candidate(engine, precision, None, refused=str(error))


class Precisions(Protocol):
    """What else than float32 is tried; see ``revnets.deploy.precisions``."""

    def works(
        self, model: nn.Module, x: Tensor, any_batch: bool, folder: Path, name: str, made: Sequence[Candidate]
    ) -> list[Callable[[], Candidate]]:
        """What makes the candidates, once those in float32 are in ``made``."""

    def judge(self, model: nn.Module, made: Sequence[Candidate], progress: Progress) -> None:
        """Measures accuracy, and refuses candidates."""


@dataclass(frozen=True)
class Deployed:
    """A file that was written.

    Attributes:
        engine: that runs it.
        path: of the file; OpenVINO has a ``.bin`` beside its ``.xml``.
        error: largest difference from the model's outputs, relative to the largest output.
        seconds: of a call on the example input, the least of some, by the name of the candidate; empty for one alone.
        layers: of the engine ``sparse``: what became of each.
        precision: that it computes in.
        candidates: all that were compared, those that were refused included.
    """

    engine: str
    path: Path
    error: float
    seconds: Mapping[str, float]
    layers: tuple[Layer, ...] = ()
    precision: str = FLOAT32
    candidates: tuple[Candidate, ...] = ()


def plainly(work: Iterable[Any], what: str) -> Iterable[Any]:
    """No progress is shown."""
    return work


def timed(made: Sequence[Candidate], x: Tensor, repeats: int, progress: Progress = plainly) -> None:
    """Seconds of each, see ``least``."""
    runs = [one.run for one in made if one.run is not None]
    for one, seconds in zip(made, least(runs, x, repeats, progress), strict=True):
        one.seconds = seconds


def least(runs: Sequence[Runner], x: Tensor, repeats: int, progress: Progress = plainly) -> list[float]:
    """The least seconds of a call of each, by turns, since other programs only ever make one slower.

    Of one thread it is the processor's time, which is that of a free machine on a busy one, too.
    """
    alone = torch.get_num_threads() == 1
    steps = [partial(run, x) for run in runs]
    taken = rounds(steps, repeats, _WARM_SECONDS, lambda numbers: progress(numbers, "timing"))
    return [min(cpu if alone else wall for wall, cpu in found) for found in taken]


def fastest(made: Sequence[Candidate], x: Tensor, repeats: int) -> Candidate:
    """The candidate to take; of equally fast ones the dense one."""

    def order(one: Candidate) -> tuple[float, bool]:
        return one.seconds, not one.dense

    allowed = sorted((one for one in made if not one.refused), key=order)
    if len(allowed) > 1 and allowed[1].seconds < _CLOSE * allowed[0].seconds:
        timed(allowed[:2], x, _REPEATS_OF_CLOSE * repeats)
    return min(allowed, key=order)
