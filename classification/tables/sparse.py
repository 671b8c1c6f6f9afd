"""Dense against the sparse members, and schedule against schedule, over seeds: same FLOPs, same recipe, one table.

python -m classification.tables.sparse --images 10000 --jobs 2
python -m classification.tables.sparse --seeds 0 --runs dense sparse_wide-rigl --images 500 --epochs 1

Every run is a process of train.py with one thread; finished runs are skipped and broken ones go on where they stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from revnets.training.errors import UserError, guarded
from revnets.training.options.parsing import parse
from revnets.training.pictures import new_figure, save_figure

from ..options import TrainOptions
from .series import Stage, at_once, digest_of, series_parser, share_of_zeros, subset, writable, write_rows

_logger = logging.getLogger("classification")
ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "classification" / "sparse_ift" / "cifar10_small.yaml"
MEMBERS = ("sparse_wide", "sparse_parallel", "sparse_factorized", "sparse_doped")
SCHEDULES = ("static", "set", "rigl")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run: its line of the table, its seed, and what it came to."""

    name: str
    seed: int
    top1: float
    train_flops: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 2 after a user mistake."""
    return guarded(lambda: run(_arguments(argv)))


def names(compared: str) -> list[str]:
    """The lines of the table: dense, every member with RigL, and one member with the other schedules."""
    return ["dense", *(f"{m}-rigl" for m in MEMBERS), *(f"{compared}-{s}" for s in SCHEDULES if s != "rigl")]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description = "Seeds x members x schedules on one recipe."
    parser = series_parser("sparse_table", description, "output/sparse_table", images=10000)
    parser.add_argument("--config", default=str(CONFIG), help="recipe of all runs")
    parser.add_argument("--sparsity", type=share_of_zeros, default=0.75)
    parser.add_argument("--compared", choices=MEMBERS, default="sparse_wide", help="member with every schedule")
    parser.add_argument("--runs", nargs="+", help="lines of the table; all where not given")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Outcome]:
    """Trains what is missing, then writes `table.csv` and `table.png` and prints the table.

    Raises:
        UserError: An unknown line, no data, or a run that failed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = args.runs or names(args.compared)
    known = {f"{m}-{s}" for m in MEMBERS for s in SCHEDULES} | {"dense"}
    if unknown := [line for line in lines if line not in known]:
        raise UserError(f"--runs: '{unknown[0]}' was given where one of {', '.join(sorted(known))} was expected.")
    options = parse(TrainOptions, ["--config", args.config], "")
    epochs = args.epochs or options.epochs
    output, digest = writable(args.output), digest_of(options)
    made = output / f"data-{args.images}-{digest}"
    data = subset(Path(options.data_dir), options.train_split, options.val_split, args.images, made)
    wanted = [(line, seed) for seed in args.seeds for line in lines]  # a whole comparison first, then the next seed
    done = at_once(args.jobs, lambda pair: _train(args, data, epochs, digest, *pair), wanted)
    write_rows(done, output / "table.csv")
    draw_table(done, output / "table.png", f"{options.model}, {args.images} images, {epochs} epochs")
    Console(width=140).print(as_table(done))
    return done


def _train(args: argparse.Namespace, data: Path, epochs: int, digest: str, line: str, seed: int) -> Outcome:
    name = f"{line}-{args.sparsity:g}-{args.images}x{epochs}-seed{seed}-{digest}"
    more = ["--data-dir", str(data), "--seed", str(seed)]
    if line != "dense":
        member, schedule = line.rsplit("-", 1)
        more += ["--layers", f"{member}:{args.sparsity:g}", "--sparsity-schedule", schedule]
    row = Stage(name, args.config, Path(args.output), epochs, tuple(more)).run()
    return Outcome(line, seed, row["eval_top1"], row.get("train_flops", math.nan))


def grouped(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes by line of the table."""
    found: dict[str, list[Outcome]] = {}
    for each in outcomes:
        found.setdefault(each.name, []).append(each)
    return found


def as_table(outcomes: Sequence[Outcome]) -> Table:
    """Mean, spread and training FLOPs by line, against dense."""
    columns = ("network", "seeds", "top-1, mean %", "± std", "lowest to highest", "against dense", "training TFLOPs")
    table = Table(*columns)
    lines = grouped(outcomes)
    dense = statistics.mean(o.top1 for o in lines["dense"]) if "dense" in lines else math.nan
    for name, found in lines.items():
        top1 = [o.top1 for o in found]
        std = statistics.stdev(top1) if len(top1) > 1 else math.nan
        mean = statistics.mean(top1)
        flops = statistics.mean(o.train_flops for o in found) / 1e12
        spread = f"{min(top1):.2f} to {max(top1):.2f}"
        table.add_row(
            name, str(len(found)), f"{mean:.2f}", f"{std:.2f}", spread, f"{mean - dense:+.2f}", f"{flops:.4f}"
        )
    return table


def draw_table(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Draws every run as a point and every mean as a bar; says so where matplotlib is not installed."""
    figure = new_figure(path, (8, 4.5))
    if figure is None:
        return
    axis: Any = figure.subplots()
    lines = grouped(outcomes)
    for i, found in enumerate(lines.values()):
        axis.plot([i] * len(found), [o.top1 for o in found], "o", color="C0", alpha=0.6)
        mean = statistics.mean(o.top1 for o in found)
        axis.plot([i - 0.3, i + 0.3], [mean, mean], color="C1", linewidth=2)
    axis.set_xticks(range(len(lines)), list(lines), rotation=20, ha="right", fontsize="small")
    axis.set(title=title, ylabel="top-1, %")
    axis.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
