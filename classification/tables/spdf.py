"""Sparse pre-training, dense fine-tuning: how much accuracy a cheaper pre-training costs on a new task, over seeds.

python -m classification.tables.spdf --output output/spdf_table

The first half of a data set's classes is the task of the pre-training, with fixed random masks at each sparsity; the
other half is the new task, on which everything is fine-tuned dense. Trainings are processes of train.py with one
thread; what is finished is skipped, broken runs go on where they stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from revnets.training.errors import guarded
from revnets.training.options.parsing import SEED, Parser, argument, parse
from revnets.training.pictures import new_figure, save_figure

from ..options import TrainOptions, as_dict
from .series import Stage, digest, part_of, positive, share_of_zeros, writable, write_table

_logger = logging.getLogger("classification")
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "classification" / "prune" / "cifar10_small_resnet18.yaml"
SCRATCH = "none"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A pre-training and the fine-tuning after it."""

    sparsity: str  # of the pre-training; `none` where there was none
    seed: int
    pretrain_top1: float
    top1: float
    pretrain_flops: float
    finetune_flops: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 2 after a user mistake."""
    return guarded(lambda: run(_arguments(argv)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="spdf_table", description="Sparsities x seeds, then dense.", allow_abbrev=False)
    parser.add_argument("--config", default=str(CONFIG), help="recipe of all trainings")
    parser.add_argument(
        "--output",
        type=argument(str, path=True),
        default="output/spdf_table",
        help="folder of the runs and of the table",
    )
    parser.add_argument("--sparsities", nargs="+", type=share_of_zeros, default=[0.0, 0.5, 0.75])
    parser.add_argument("--seeds", type=argument(int, low=0, high=SEED), nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=positive, default=25000, help="of the pre-training, of each class as many")
    parser.add_argument("--finetune-images", type=positive, default=10000, help="of the new task")
    parser.add_argument("--epochs", type=positive, default=3, help="of the pre-training")
    parser.add_argument("--finetune-epochs", type=positive, default=4)
    parser.add_argument("--finetune-lr", type=argument(float, low=0), default=0.5, help="of the recipe's learning rate")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Outcome]:
    """Trains what is missing, then writes `table.csv`, `table.json`, `table.png` and prints the table.

    Raises:
        UserError: No data, or a run that failed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = writable(args.output)
    options = parse(TrainOptions, ["--config", args.config], "")
    halves = _halves(args, options, output)
    done: list[Outcome] = []
    for seed in args.seeds:  # a whole comparison first, then the next seed
        for sparsity in (None, *args.sparsities):
            done.append(_outcome(args, options, output, halves, sparsity, seed))
            write_table(done, output)
    draw_table(done, output / "table.png", f"{options.model}: pre-trained on half of the classes, then on the others")
    Console(width=140).print(as_table(done))
    return done


def _halves(args: argparse.Namespace, options: TrainOptions, output: Path) -> tuple[Path, Path]:
    """The folders of the two tasks."""
    source = Path(options.data_dir)
    made = []
    for name, images in (("first", args.images), ("second", args.finetune_images)):
        folder = output / f"data-{name}-{images}-{digest({'from': str(source.resolve())})}"
        folder.mkdir(exist_ok=True)

        def half(names: list[str], first: bool = name == "first") -> list[str]:
            middle = len(names) // 2
            return names[:middle] if first else names[middle:]

        part_of(source / options.train_split, folder / options.train_split, images, half)
        part_of(source / options.val_split, folder / options.val_split, None, half)
        made.append(folder)
    return made[0], made[1]


def _outcome(
    args: argparse.Namespace,
    options: TrainOptions,
    output: Path,
    halves: tuple[Path, Path],
    sparsity: float | None,
    seed: int,
) -> Outcome:
    recipe = digest({**as_dict(options), "data": [str(half) for half in halves], "epochs": args.epochs})
    word = SCRATCH if sparsity is None else f"{sparsity:g}"
    start: tuple[str, ...] = ()
    before = {"eval_top1": float("nan"), "train_flops": 0.0}
    if sparsity is not None:
        layers = ("--layers", f"sparse:{sparsity:g}") if sparsity else ()
        more = ("--data-dir", str(halves[0]), "--seed", str(seed), *layers)
        first = Stage(f"pretrain-{word}-seed{seed}-{recipe}", args.config, output, args.epochs, more)
        before = first.run()
        lr = str(args.finetune_lr * (options.lr or 0.1))
        start = ("--initial-checkpoint", str(first.weights), "--lr", lr)
    more = ("--data-dir", str(halves[1]), "--seed", str(seed), *start)
    tuned = f"{args.finetune_epochs}x{args.finetune_lr:g}"
    after = Stage(f"finetune-{word}-{tuned}-seed{seed}-{recipe}", args.config, output, args.finetune_epochs, more).run()
    flops = (before.get("train_flops", 0.0), after.get("train_flops", 0.0))
    return Outcome(word, seed, before["eval_top1"], after["eval_top1"], *flops)


def grouped(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes by sparsity of the pre-training."""
    found: dict[str, list[Outcome]] = {}
    for each in outcomes:
        found.setdefault(each.sparsity, []).append(each)
    return found


def as_table(outcomes: Sequence[Outcome]) -> Table:
    """Mean and spread on the new task, and FLOPs of both phases against those of the dense pre-training."""
    columns = ("pre-training", "seeds", "its top-1, %", "top-1 of the new task, %", "± std", "against dense")
    table = Table(*columns, "pre-training TFLOPs", "of dense", "with fine-tuning", "of dense")
    lines = grouped(outcomes)
    dense = lines.get("0", [])
    for word, found in lines.items():
        top1 = [o.top1 for o in found]
        std = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "-"
        mean = statistics.mean(top1)
        before = statistics.mean(o.pretrain_flops for o in found)
        both = before + statistics.mean(o.finetune_flops for o in found)
        row = [word, str(len(found)), f"{statistics.mean(o.pretrain_top1 for o in found):.2f}", f"{mean:.2f}", std]
        row += [f"{mean - statistics.mean(o.top1 for o in dense):+.2f}" if dense else "-"]
        for flops, whole in ((before, _mean(dense, False)), (both, _mean(dense, True))):
            row += [f"{flops / 1e12:.3f}", f"{flops / whole:.3f}" if whole else "-"]
        table.add_row(*row)
    return table


def _mean(outcomes: Sequence[Outcome], both: bool) -> float:
    totals = [o.pretrain_flops + (o.finetune_flops if both else 0.0) for o in outcomes]
    return statistics.mean(totals) if totals else 0.0


def draw_table(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Draws accuracy over the FLOPs of both phases; says so where matplotlib is not installed."""
    figure = new_figure(path, (8, 4.5))
    if figure is None:
        return
    axis: Any = figure.subplots()
    for i, (word, found) in enumerate(grouped(outcomes).items()):
        flops = statistics.mean(o.pretrain_flops + o.finetune_flops for o in found) / 1e12
        top1 = [o.top1 for o in found]
        axis.plot([flops] * len(found), top1, "o", color=f"C{i}", alpha=0.5)
        label = "no pre-training" if word == SCRATCH else f"pre-trained at {float(word):.0%} sparsity"
        axis.plot(flops, statistics.mean(top1), "_", color=f"C{i}", markersize=24, markeredgewidth=2, label=label)
    axis.set(title=title, xlabel="FLOPs of both trainings, 10^12 (theoretical)", ylabel="top-1 of the new task, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
