"""Launches of a training step, network by network and mode by mode: a small network on a GPU waits for little else."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...training.options.values import find_device, refused
from ..fake import ProfileError
from ..launches.counting import Kernels, Launches, count_kernels, count_launches
from ..launches.cuda import count_cuda_kernels
from ..profile import describe
from ..report.tables import save_json
from ..target import Job, Setting
from .ablation import COMPILED, VARIANTS
from .timing import Case

LARGEST = 6
"""Kinds of calls in the table."""


@dataclass(frozen=True)
class LaunchRow:
    """What was counted for a case: its operators or, where it is compiled, its kernels.

    Attributes:
        case: of the bench.
        launches: operator calls.
        kernels: of compiled branches, in place of ``launches``.
        on_cuda: kernels that CUDA would run, see ``cuda_launches``; None where they are not counted.
        why_not: in a sentence.
    """

    case: Case
    launches: Launches = field(default_factory=Launches)
    kernels: Kernels | None = None
    on_cuda: Counter[str] | None = None
    why_not: str = ""

    @property
    def total(self) -> int:
        """Operator calls, or kernels."""
        return self.launches.calls.total() if self.kernels is None else self.kernels.total

    def kinds(self) -> list[tuple[str, int]]:
        """What was called, the most frequent first; the compiler's loops as one kind."""
        if self.kernels is None:
            return self.launches.calls.most_common()
        return (self.kernels.others + type(self.kernels.others)(fused=self.kernels.fused.total())).most_common()


def run(
    cases: Sequence[Case], setting: Setting, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> list[LaunchRow]:
    """Count all cases.

    Args:
        cases: rows of the table, see ``bench.make_cases``.
        setting: what they share.
        progress: wraps the list of cases, e.g. ``rich.progress.track``.

    Raises:
        ProfileError: for a network that does not run.
    """
    find_device(setting.device, here=True)
    rows = []
    for case in progress(cases):
        with refused(f"{case.target} cannot be built on {setting.device}", kind=ProfileError):
            job = VARIANTS[case.variant].build(case.target, setting)
        with refused(f"{case.target} cannot run", kind=ProfileError):
            if case.variant == COMPILED:
                rows.append(LaunchRow(case, kernels=count_kernels(job.model, job.x, job.loss_fn)))
            else:
                launches = count_launches(job.model, job.x, job.loss_fn)
                rows.append(LaunchRow(case, launches, None, *_on_cuda(job, setting)))
    return rows


def _on_cuda(job: Job, setting: Setting) -> tuple[Counter[str] | None, str]:
    """Kernels on CUDA with Triton, or why they are not counted."""
    if setting.amp_dtype is not None and not torch.cuda.is_available():
        return None, "without CUDA torch has no autocast for it: leave out --amp"
    try:
        return count_cuda_kernels(job.model, job.x, job.loss_fn), ""
    except ProfileError as error:
        return None, str(error)


def ratios(rows: Sequence[LaunchRow]) -> Iterator[tuple[LaunchRow, float | None]]:
    """Each row, with its total relative to that of storing everything; None where that was not counted."""
    stored = {
        (row.case.target.name, row.case.target.img_size, row.case.target.batch_size): row.total
        for row in rows
        if row.case.target.mode == "store" and row.kernels is None
    }
    for row in rows:
        target = row.case.target
        base = stored.get((target.name, target.img_size, target.batch_size))
        yield row, row.total / base if base else None


def print_rows(rows: Sequence[LaunchRow], setting: Setting) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Launches of one training step, forward and backward ({describe(setting)})",
        caption="calls: operators that run something, one of ours counting once; torch's own: the same with ours taken "
        "apart; floor: convolutions and products of matrices among them, which no fusion takes away; on CUDA: counted "
        "with fake tensors, our Triton kernels each, any other operator as one, a gradient of a convolution as one",
    )
    words = ("network", "mode", "variant", "largest kinds")
    numbers = ("calls or kernels", "x store", "torch's own", "floor", "kernels on CUDA (Triton)")
    for column in (*words[:3], *numbers, words[3]):
        table.add_column(column, justify="left" if column in words else "right")
    for row, ratio in ratios(rows):
        target, eager = row.case.target, row.kernels is None
        table.add_row(
            str(target),
            target.mode_name,
            row.case.variant,
            f"{row.total:,}",
            "-" if ratio is None else f"{ratio:.3f}",
            f"{row.launches.kernels.total():,}" if eager else "-",
            f"{row.launches.floor:,}" if eager else "-",
            "-" if row.on_cuda is None else f"{row.on_cuda.total():,}",
            ", ".join(f"{name.rpartition('.')[2]} {count:,}" for name, count in row.kinds()[:LARGEST]),
        )
    console = Console(width=200)
    console.print(table)
    for row in rows:
        if row.why_not:
            line = f"{row.case.target}, {row.case.target.mode_name}: kernels on CUDA are not counted: {row.why_not}"
            console.print(line, markup=False, highlight=False)


def save(rows: Sequence[LaunchRow], setting: Setting, path: Path) -> None:
    """Write the numbers as JSON, complete or not at all."""
    records = [
        {
            "case": asdict(row.case),
            "total": row.total,
            "times_store": ratio,
            "floor": row.launches.floor if row.kernels is None else None,
            "on_cuda": None if row.on_cuda is None else {"total": row.on_cuda.total(), **row.on_cuda},
            **{name: dict(count) for name, count in vars(row.kernels or row.launches).items()},
        }
        for row, ratio in ratios(rows)
    ]
    save_json(records, setting, path)
