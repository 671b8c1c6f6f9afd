"""Dense against the sparse members, and schedule against schedule, over seeds: same FLOPs, same recipe, one table.

python -m classification.tables.sparse --data-dir CIFAR10 --images 10000 --jobs 2
python -m classification.tables.sparse --data-dir CIFAR10 --seeds 0 --runs dense sparse_wide-set --images 500 --epochs 1

Every run is a process of train.py with one thread; finished runs are skipped and broken ones go on where they stopped.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from revnets.training.errors import UserError

from ..options import CONFIGS
from . import runner
from .runner import Column, Outcomes, against, finite, flag, mean, same
from .series import Stage, at_once, digest_of, parts, read_recipe

CONFIG = CONFIGS / "sparse_ift" / "cifar10_small.yaml"
MEMBERS = ("sparse_wide", "sparse_parallel", "sparse_factorized", "sparse_doped")
SCHEDULES = ("static", "set", "rigl")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run: its line of the table, its seed, and what it came to."""

    name: str
    seed: int
    top1: float
    train_flops: float


def _range(found: Outcomes, _: runner.Lines) -> str:
    top1 = finite(found, "top1")
    return f"{min(top1):.2f} to {max(top1):.2f}"


class Table(runner.Table):
    """Dense, every member with RigL, and one member with the other schedules."""

    folder = "sparse_table"
    description = "Seeds x members x schedules on one recipe."
    options = (
        *runner.series(images=10000),
        flag("--config", default=str(CONFIG), help="recipe of all runs"),
        flag("--sparsity", type=runner.share_of_zeros, default=0.75),
        flag("--compared", choices=MEMBERS, default="sparse_wide", help="member with every schedule"),
        flag("--runs", nargs="+", help="lines of the table; all where not given"),
    )
    columns = (
        Column("network", same("name")),
        Column("seeds", runner.count),
        Column("top-1, mean %", mean("top1")),
        Column("± std", runner.spread),
        Column("lowest to highest", _range),
        Column("against dense", against("dense")),
        Column("training TFLOPs", mean("train_flops", ".4f", 1e12)),
    )

    def check(self) -> None:
        """Refuses lines that there are none of.

        Raises:
            UserError: Naming one.
        """
        known = {f"{m}-{s}" for m in MEMBERS for s in SCHEDULES} | {"dense"}
        if unknown := [name for name in self.args.runs or () if name not in known]:
            raise UserError(f"--runs: '{unknown[0]}' was given where one of {', '.join(sorted(known))} was expected.")
        self.recipe = read_recipe(self.args.config, self.args.data_dir)
        self.epochs = self.args.epochs or self.recipe.epochs

    def names(self) -> list[str]:
        """The lines of the table."""
        others = [f"{self.args.compared}-{schedule}" for schedule in SCHEDULES if schedule != "rigl"]
        return self.args.runs or ["dense", *(f"{member}-rigl" for member in MEMBERS), *others]

    def outcomes(self) -> Iterator[Outcome]:
        """A whole comparison first, then the next seed."""
        data = parts(self.recipe, self.output, self.args.images)
        wanted = [(name, seed) for seed in self.args.seeds for name in self.names()]
        yield from at_once(self.args.jobs, lambda pair: self._trained(data, *pair), wanted)

    def _trained(self, data: Path, line: str, seed: int) -> Outcome:
        args = self.args
        name = f"{line}-{args.sparsity:g}-{args.images}x{self.epochs}-seed{seed}-{digest_of(self.recipe, data)}"
        more = ["--data-dir", str(data), "--seed", str(seed)]
        if line != "dense":
            member, schedule = line.rsplit("-", 1)
            more += ["--layers", f"{member}:{args.sparsity:g}", "--sparsity-schedule", schedule]
        row = Stage(name, args.config, self.output, self.epochs, tuple(more)).run()
        return Outcome(line, seed, row["eval_top1"], row.get("train_flops", math.nan))

    def line(self, outcome: Outcome) -> str:
        """The network."""
        return outcome.name

    def draw(self, figure: Any, done: Outcomes) -> None:
        """Every run as a point and every mean as a bar."""
        axis, lines = figure.subplots(), self.lines(done)
        for i, found in enumerate(lines.values()):
            axis.plot([i] * len(found), [o.top1 for o in found], "o", color="C0", alpha=0.6)
            middle = runner.average(found, "top1")
            axis.plot([i - 0.3, i + 0.3], [middle, middle], color="C1", linewidth=2)
        axis.set_xticks(range(len(lines)), list(lines), rotation=20, ha="right", fontsize="small")
        title = f"{self.recipe.model}, {self.args.images} images, {self.epochs} epochs"
        axis.set(title=title, ylabel="top-1, %")
        axis.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    sys.exit(Table.main())
