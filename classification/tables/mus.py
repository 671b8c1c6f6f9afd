"""Standard layers against munit-scaled ones, in the usual precision and in FP8, over seeds: curves in one picture.

python -m classification.tables.mus
python -m classification.tables.mus --networks mus-vit-tiny --seeds 0 --images 1000 --epochs 1

Every run is a process of train.py with one thread; finished runs are skipped and broken ones go on where they stopped.
A line such as `mus_fp8-lr2x` is the same run with twice the learning rate, for the first seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from revnets.training.errors import guarded
from revnets.training.files import whole_file
from revnets.training.options.parsing import parse
from revnets.training.pictures import new_figure, save_figure

from ..options import TrainOptions
from ..report import Row, read_summary
from .series import (
    at_once,
    digest_of,
    failed,
    finished,
    positive,
    run_training,
    series_parser,
    subset,
    writable,
    write_rows,
)

_logger = logging.getLogger("classification")
RECIPES = Path(__file__).resolve().parents[2] / "configs" / "classification" / "mus"
NETWORKS = ("revbifpn-s0", "mus-vit-tiny")
VARIANTS = {"standard": "", "mus": "mus:init", "mus_fp8": "mus_fp8:init"}  # to the layers
DOUBLED = "lr2x"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A run: its network, its line of the table, its seed, and what it came to; NaN where its loss was not finite."""

    network: str
    line: str
    seed: int
    top1: float
    eval_loss: float
    train_loss: float
    epochs: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What is needed to start a run or to find it again."""

    network: str
    line: str
    seed: int
    name: str
    recipe: Path
    data: Path
    epochs: int
    options: TrainOptions

    @property
    def lr(self) -> float:
        """The learning rate."""
        return (2 if self.line.endswith(DOUBLED) else 1) * (self.options.lr or math.nan)

    @property
    def more(self) -> list[str]:
        """Options besides the recipe's: layers for conversion, or of a network that is made of them."""
        layers = VARIANTS[self.line.removesuffix(f"-{DOUBLED}")]
        option = ["--layers", layers] if self.options.layers else ["--model-kwargs", f"layers={layers}"]
        chosen = option if layers else []
        return [*chosen, "--lr", str(self.lr)] if self.line.endswith(DOUBLED) else chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 2 after a user mistake."""
    return guarded(lambda: run(_arguments(argv)))


def lines() -> list[str]:
    """The lines of the table of a network: every variant, and the munit-scaled ones with twice the learning rate."""
    return [*VARIANTS, *(f"{variant}-{DOUBLED}" for variant, layers in VARIANTS.items() if layers)]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description = "Standard, munit-scaled and FP8 layers on the same network, over seeds."
    parser = series_parser("mus_table", description, "output/mus_table", images=2500)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runs", nargs="+", choices=lines(), default=lines(), help="lines of the table")
    parser.add_argument("--doubled-seeds", type=positive, default=1, help="seeds of the lines with twice the rate")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Outcome]:
    """Trains what is missing, writes `table.csv`, `table.json` and `curves.png`, and prints the table.

    Raises:
        UserError: No data, or a run that failed other than by a loss that was not finite.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = writable(args.output)
    wanted = planned(args, output)
    done = at_once(args.jobs, lambda one: _train(output, one), wanted)
    write_rows(done, output / "table.csv")
    curves = {one.name: read_summary(output / one.name / "summary.csv") for one in wanted if _has_rows(output, one)}
    _write_json(done, wanted, curves, output / "table.json")
    draw_curves(done, wanted, curves, output / "curves.png", args.images)
    Console(width=140).print(as_table(done))
    return done


def planned(args: argparse.Namespace, output: Path) -> list[Run]:
    """All runs: a whole comparison of all networks first, then the next seed."""
    found = []
    for index, seed in enumerate(args.seeds):
        for network in args.networks:
            for line in args.runs:
                if line.endswith(DOUBLED) and index >= args.doubled_seeds:
                    continue
                suffix = "_standard" if line == "standard" else ""
                recipe = RECIPES / f"cifar10_{network}{suffix}.yaml"
                options = parse(TrainOptions, ["--config", str(recipe)], "")
                epochs, digest = args.epochs or options.epochs, digest_of(options)
                data = subset(
                    Path(options.data_dir),
                    options.train_split,
                    options.val_split,
                    args.images,
                    output / f"data-{args.images}",
                )
                name = f"{network}-{line}-{args.images}x{epochs}-seed{seed}-{digest}"
                found.append(Run(network, line, seed, name, recipe, data, epochs, options))
    return found


def _train(output: Path, one: Run) -> Outcome:
    if (found := _outcome(output, one)) is not None:
        return found
    more = ["--data-dir", str(one.data), "--seed", str(one.seed), *one.more]
    code = run_training(output, one.name, str(one.recipe), one.epochs, more)
    found = _outcome(output, one)
    if found is None:
        raise failed(output, one.name, code)
    _logger.info(f"{one.name}: top-1 {found.top1:.2f}%, training loss {found.train_loss:.4f}")
    return found


def _outcome(output: Path, one: Run) -> Outcome | None:
    rows = finished(output / one.name, one.epochs)
    if rows is not None:
        last = rows[-1]
        figures = (last["eval_top1"], last["eval_loss"], last["train_loss"])
    elif _not_finite(output / f"{one.name}.log"):
        figures = (math.nan, math.nan, math.nan)
    else:
        return None
    return Outcome(one.network, one.line, one.seed, *figures, one.epochs)


def _not_finite(log: Path) -> bool:
    """Whether train.py stopped a run because of its loss."""
    last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2] if log.exists() else ""
    return last.startswith(("error: the loss is nan", "error: the loss is inf", "error: the loss is -inf"))


def _has_rows(output: Path, one: Run) -> bool:
    return (output / one.name / "summary.csv").exists()


def grouped(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """The outcomes by network and line."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for each in outcomes:
        found.setdefault((each.network, each.line), []).append(each)
    return found


def as_table(outcomes: Sequence[Outcome]) -> Table:
    """Means and spreads by network and line, FP8 against the same without."""
    table = Table("network", "layers", "seeds", "top-1, mean %", "± std", "against mus", "training loss", "not finite")
    found = grouped(outcomes)
    for (network, line), each in found.items():
        finite = [o for o in each if math.isfinite(o.train_loss)]
        top1 = [o.top1 for o in finite]
        same = {o.seed: o.top1 for o in found.get((network, "mus"), [])}
        pairs = [o.top1 - same[o.seed] for o in finite if o.seed in same]
        table.add_row(
            *(network, line, str(len(each))),
            f"{statistics.mean(top1):.2f}" if top1 else "-",
            f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "-",
            f"{statistics.mean(pairs):+.2f}" if pairs and line != "mus" else "-",
            f"{statistics.mean(o.train_loss for o in finite):.4f}" if finite else "-",
            str(len(each) - len(finite)),
        )
    return table


def _write_json(outcomes: Sequence[Outcome], runs: Sequence[Run], curves: dict[str, list[Row]], path: Path) -> None:
    """Everything, curves included; numbers that are not finite become null."""
    content = []
    for outcome, one in zip(outcomes, runs, strict=True):
        figures = {k: None if isinstance(v, float) and v != v else v for k, v in dataclasses.asdict(outcome).items()}
        rows = curves.get(one.name, [])
        losses = {name: [row[name] for row in rows if name in row] for name in ("train_loss", "eval_loss")}
        content.append({**figures, "lr": one.lr, "curves": losses})
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def draw_curves(
    outcomes: Sequence[Outcome], runs: Sequence[Run], curves: dict[str, list[Row]], path: Path, images: int
) -> None:
    """Draws the training losses of all runs, and their final accuracies, a row of panels per network."""
    networks = list(dict.fromkeys(one.network for one in runs))
    figure = new_figure(path, (11, 4.2 * len(networks)))
    if figure is None:
        return
    axes = figure.subplots(len(networks), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), network in zip(axes, networks, strict=True):
        present = [line for line in lines() if any(o.line == line and o.network == network for o in outcomes)]
        for number, line in enumerate(present):
            color, style = f"C{number}", "--" if line.endswith(DOUBLED) else "-"
            for outcome, one in zip(outcomes, runs, strict=True):
                if (one.network, one.line) != (network, line):
                    continue
                points = [(row["epoch"] + 1, row["train_loss"]) for row in curves.get(one.name, [])]
                label = line if one.seed == min(r.seed for r in runs if r.line == line) else None
                if points:
                    left.plot(*zip(*points, strict=True), style, color=color, alpha=0.8, linewidth=1.2, label=label)
                right.plot([number], [outcome.top1], "o", color=color, alpha=0.7)
        left.set(xlabel="epoch", ylabel="training loss", title=f"{network} on CIFAR-10, {images} images")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.legend(fontsize="small")
        right.set_xticks(range(len(present)), present, rotation=20, ha="right", fontsize="small")
        right.set(ylabel="validation top-1, %", title="after the last epoch, every seed")
        for axis in (left, right):
            axis.grid(alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
