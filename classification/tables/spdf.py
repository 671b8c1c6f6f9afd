"""Sparse pre-training, dense fine-tuning: how much accuracy a cheaper pre-training costs on a new task, over seeds.

python -m classification.tables.spdf --data-dir CIFAR10 --output output/spdf_table

The first half of a data set's classes is the task of the pre-training, with fixed random masks at each sparsity; the
other half is the new task, on which everything is fine-tuned dense. Trainings are processes of train.py with one
thread; what is finished is skipped, broken runs go on where they stopped.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from revnets.training.options.parsing import argument

from ..options import CONFIGS
from . import runner
from .runner import Column, Outcomes, against, average, flag, mean, positive, same
from .series import Stage, digest_of, parts, read_recipe

CONFIG = CONFIGS / "prune" / "cifar10_small_resnet18.yaml"
SCRATCH, DENSE = "none", "0"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A pre-training and the fine-tuning after it."""

    sparsity: str  # of the pre-training; `none` where there was none
    seed: int
    pretrain_top1: float
    top1: float
    pretrain_flops: float
    finetune_flops: float


def _teraflops(*names: str) -> Callable[[Outcomes, runner.Lines], str]:
    return lambda found, _: runner.number(average(found, *names) / 1e12, ".3f")


def _of_dense(*names: str) -> Callable[[Outcomes, runner.Lines], str]:
    def share(found: Outcomes, lines: runner.Lines) -> str:
        whole = average(lines.get(DENSE, ()), *names)
        return runner.number(average(found, *names) / whole if whole else math.nan, ".3f")

    return share


class Table(runner.Table):
    """Sparsities of the pre-training, and none at all."""

    folder = "spdf_table"
    description = "Sparsities x seeds, then dense."
    options = (
        flag("--config", default=str(CONFIG), help="recipe of all trainings"),
        flag("--sparsities", nargs="+", type=runner.share_of_zeros, default=[0.0, 0.5, 0.75]),
        runner.DATA,
        runner.SEEDS,
        flag("--images", type=positive, default=25000, help="of the pre-training, of each class as many"),
        flag("--finetune-images", type=positive, default=10000, help="of the new task"),
        flag("--epochs", type=positive, default=3, help="of the pre-training"),
        flag("--finetune-epochs", type=positive, default=4),
        flag("--finetune-lr", type=argument(float, low=0), default=0.5, help="of the recipe's learning rate"),
    )
    columns = (
        Column("pre-training", same("sparsity")),
        Column("seeds", runner.count),
        Column("its top-1, %", mean("pretrain_top1")),
        Column("top-1 of the new task, %", mean("top1")),
        Column("± std", runner.spread),
        Column("against dense", against(DENSE)),
        Column("pre-training TFLOPs", _teraflops("pretrain_flops")),
        Column("of dense", _of_dense("pretrain_flops")),
        Column("with fine-tuning", _teraflops("pretrain_flops", "finetune_flops")),
        Column("of dense", _of_dense("pretrain_flops", "finetune_flops")),
    )

    def check(self) -> None:
        """Reads the recipe."""
        self.recipe = read_recipe(self.args.config, self.args.data_dir)

    def outcomes(self) -> Iterator[Outcome]:
        """A whole comparison first, then the next seed."""
        halves = self._half("first", self.args.images), self._half("second", self.args.finetune_images)
        for seed in self.args.seeds:
            for sparsity in (None, *self.args.sparsities):
                yield self._outcome(halves, sparsity, seed)

    def _half(self, name: str, images: int) -> Path:
        """The folder of one of the two tasks."""

        def half(names: list[str]) -> list[str]:
            middle = len(names) // 2
            return names[:middle] if name == "first" else names[middle:]

        return parts(self.recipe, self.output, images, None, f"data-{name}", half)

    def _outcome(self, halves: tuple[Path, Path], sparsity: float | None, seed: int) -> Outcome:
        args, output = self.args, self.output
        recipe = digest_of(self.recipe, *halves, epochs=args.epochs)
        word = SCRATCH if sparsity is None else f"{sparsity:g}"
        start: tuple[str, ...] = ()
        before = {"eval_top1": math.nan, "train_flops": 0.0}
        if sparsity is not None:
            layers = ("--layers", f"sparse:{sparsity:g}") if sparsity else ()
            more = ("--data-dir", str(halves[0]), "--seed", str(seed), *layers)
            first = Stage(f"pretrain-{word}-seed{seed}-{recipe}", args.config, output, args.epochs, more)
            before = first.run()
            lr = str(args.finetune_lr * (self.recipe.lr or 0.1))
            start = ("--initial-checkpoint", str(first.weights), "--lr", lr)
        more = ("--data-dir", str(halves[1]), "--seed", str(seed), *start)
        name = f"finetune-{word}-{args.finetune_epochs}x{args.finetune_lr:g}-seed{seed}-{recipe}"
        after = Stage(name, args.config, output, args.finetune_epochs, more).run()
        flops = (before.get("train_flops", 0.0), after.get("train_flops", 0.0))
        return Outcome(word, seed, before["eval_top1"], after["eval_top1"], *flops)

    def line(self, outcome: Outcome) -> str:
        """The sparsity of the pre-training."""
        return outcome.sparsity

    def draw(self, figure: Any, done: Outcomes) -> None:
        """Accuracy over the FLOPs of both phases."""
        axis = figure.subplots()
        for i, (word, found) in enumerate(self.lines(done).items()):
            flops = average(found, "pretrain_flops", "finetune_flops") / 1e12
            axis.plot([flops] * len(found), [o.top1 for o in found], "o", color=f"C{i}", alpha=0.5)
            label = "no pre-training" if word == SCRATCH else f"pre-trained at {float(word):.0%} sparsity"
            middle = average(found, "top1")
            axis.plot(flops, middle, "_", color=f"C{i}", markersize=24, markeredgewidth=2, label=label)
        title = f"{self.recipe.model}: pre-trained on half of the classes, then on the others"
        axis.set(title=title, xlabel="FLOPs of both trainings, 10^12 (theoretical)", ylabel="top-1 of the new task, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")


if __name__ == "__main__":
    sys.exit(Table.main())
