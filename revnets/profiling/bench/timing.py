"""Step time and memory of several networks in one run: interleaved, medians, ratios."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...training.errors import refused
from ...training.options.values import COUNT, find_device
from ..command import choose_targets
from ..fake import ProfileError
from ..memory import measure_training_step
from ..profile import describe
from ..report.tables import save_json
from ..target import Job, Setting, Target
from ..turns import second_of_two
from .ablation import AS_IT_IS, COMPILED, VARIANTS


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: a network and which part of our work is left out (see ``ablation.VARIANTS``)."""

    target: Target
    variant: str = AS_IT_IS


@dataclass(frozen=True)
class Row:
    """What was measured for a case: median seconds of a step (see ``turns.clock``), and activation bytes per sample."""

    case: Case
    seconds: float
    bytes_per_sample: float


def make_cases(
    names: Sequence[str], modes: str, setting: Setting, ablate: bool = False, compiled: bool = False
) -> list[Case]:
    """Cases of ``NAME[@SIZE][:BATCH]``, one per mode that the network has.

    Args:
        names: as typed.
        modes: of these only, separated by commas.
        setting: of the networks.
        ablate: for reversible networks in reversible mode, also one case per thing left out.
        compiled: for the same, also one case with compiled branches.

    Raises:
        ProfileError: for an unknown model or mode, or numbers that are not.

    Example:
        >>> [c.target.mode for c in make_cases(["revbifpn_s0@224:8"], "", Setting(optimizer=None))]
        ['reversible', 'store', 'checkpoint']
    """
    wanted = [v for v in VARIANTS if v == AS_IT_IS or (compiled if v == COMPILED else ablate)]
    cases = []
    for target in choose_targets(names, modes, setting):
        cases += [Case(target, variant) for variant in (wanted if target.mode == "reversible" else [AS_IT_IS])]
    if (ablate or compiled) and not any(case.target.mode == "reversible" for case in cases):
        flag = "--ablate" if ablate else "--compiled"
        raise ProfileError(f"{flag} has no effect: no network here has the mode reversible, name one, or leave it out")
    return cases


def run(
    cases: Sequence[Case],
    setting: Setting,
    repeats: int = 5,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Row]:
    """Measure all cases: memory first, then ``repeats`` rounds in which every case takes one timed step.

    Args:
        cases: rows of the table.
        setting: what they share.
        repeats: timed steps per case.
        progress: wraps the list of pieces of work, e.g. ``rich.progress.track``.

    Raises:
        ProfileError: for a network that does not run.
    """
    COUNT.check("repeats", repeats)
    find_device(setting.device, here=True)
    jobs: dict[Case, Job] = {}
    memory: dict[Case, float] = {}
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for case, measure_memory in progress([(c, n == 0) for n in range(repeats + 1) for c in cases]):
        variant = VARIANTS[case.variant]
        with variant.active():
            if measure_memory:
                with refused(f"{case.target} cannot be built on {setting.device}", kind=ProfileError):
                    jobs[case] = job = variant.build(case.target, setting)
                memory[case] = _activation_bytes(case, job) / case.target.batch_size
            else:
                job = jobs[case]
                seconds[case].append(second_of_two(job.model, job.x, job.loss_fn, job.x.device))
    return [Row(case, statistics.median(seconds[case]), memory[case]) for case in cases]


def _activation_bytes(case: Case, job: Job) -> int:
    with refused(f"{case.target} cannot run", kind=ProfileError):
        return measure_training_step(job.model, job.x, job.loss_fn).activation_bytes


def ratios(rows: Sequence[Row]) -> Iterator[tuple[Row, float, float]]:
    """Each row with its time and memory relative to storing everything, or of variants to none, in the same run."""
    base: dict[Target, Row] = {}
    for row in rows:
        target = row.case.target
        key = replace(target, mode="store")
        if row.case.variant == AS_IT_IS and (key not in base or target.mode == "store"):
            base[key] = row
    for row in rows:
        reference = base[replace(row.case.target, mode="store")]
        yield row, row.seconds / reference.seconds, row.bytes_per_sample / reference.bytes_per_sample


def print_rows(rows: Sequence[Row], setting: Setting) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"One training step ({describe(setting)})")
    words = ("network", "mode", "variant")
    for column in (*words, "step, s", "x store", "activations, MB/image", "x store"):
        table.add_column(column, justify="left" if column in words else "right")
    for row, time_ratio, memory_ratio in ratios(rows):
        target = row.case.target
        numbers = (f"{row.seconds:.3f}", f"{time_ratio:.2f}", f"{row.bytes_per_sample / 1e6:.2f}")
        table.add_row(str(target), target.mode_name, row.case.variant, *numbers, f"{memory_ratio:.3f}")
    Console(width=150).print(table)


def save(rows: Sequence[Row], setting: Setting, path: Path) -> None:
    """Write the measurements as JSON, complete or not at all."""
    save_json([asdict(row) for row in rows], setting, path)
