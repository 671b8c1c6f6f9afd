"""Standard layers against munit-scaled ones, in the usual precision and in FP8, over seeds: curves in one picture.

python -m classification.tables.mus --data-dir CIFAR10
python -m classification.tables.mus --data-dir CIFAR10 --networks mus-vit-tiny --seeds 0 --images 1000 --epochs 1

Every run is a process of train.py with one thread; finished runs are skipped and broken ones go on where they stopped.
A line such as `mus_fp8-lr2x` is the same run with twice the learning rate, for the first seed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from revnets.training.errors import UserError

from ..options import CONFIGS
from ..run.report import Row
from . import runner
from .runner import Column, Outcomes, flag, mean, positive, same
from .series import Stage, at_once, digest_of, parts, read_recipe

RECIPES = CONFIGS / "mus"
NETWORKS = ("revbifpn-s0", "mus-vit-tiny")
VARIANTS = {"standard": "", "mus": "mus:init", "mus_fp8": "mus_fp8:init"}  # to the layers
DOUBLED = "lr2x"
LINES = (*VARIANTS, *(f"{variant}-{DOUBLED}" for variant, layers in VARIANTS.items() if layers))
LOSSES = ("train_loss", "eval_loss")


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
    lr: float = math.nan
    curves: dict[str, list[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """A training that is wanted."""

    network: str
    line: str
    seed: int
    stage: Stage
    lr: float

    def outcome(self) -> Outcome:
        """Trains where that is not done yet."""
        last, rows = _figures(self.stage), self.stage.rows()
        curves = {name: [row[name] for row in rows if name in row] for name in LOSSES}
        figures = (last["eval_top1"], last["eval_loss"], last["train_loss"])
        return Outcome(self.network, self.line, self.seed, *figures, self.stage.epochs, self.lr, curves)


def _recipe(network: str, line: str) -> str:
    return str(RECIPES / f"cifar10_{network}{'_standard' if line == 'standard' else ''}.yaml")


def _figures(stage: Stage) -> Row:
    """Of the last epoch; NaN where train.py has stopped the run because of its loss."""
    none = dict.fromkeys(("eval_top1", "eval_loss", "train_loss"), math.nan)
    if stage.finished() is None and _not_finite(stage.log):
        return none
    try:
        return stage.run()
    except UserError:
        if _not_finite(stage.log):
            return none
        raise


def _not_finite(log: Path) -> bool:
    """Whether train.py stopped a run because of its loss."""
    last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2] if log.exists() else ""
    return last.startswith(("error: the loss is nan", "error: the loss is inf", "error: the loss is -inf"))


def _against_mus(found: Outcomes, lines: runner.Lines) -> str:
    """By pairs of the same seed."""
    usual = {o.seed: o.top1 for o in lines.get((found[0].network, "mus"), ())}
    pairs = [o.top1 - usual[o.seed] for o in found if o.seed in usual and math.isfinite(o.top1)]
    return f"{statistics.mean(pairs):+.2f}" if pairs and found[0].line != "mus" else "-"


class Table(runner.Table):
    """Every variant of the layers, and the munit-scaled ones with twice the learning rate."""

    folder = "mus_table"
    description = "Standard, munit-scaled and FP8 layers on the same network, over seeds."
    picture = "curves.png"
    options = (
        *runner.series(images=2500),
        flag("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)),
        flag("--runs", nargs="+", choices=LINES, default=list(LINES), help="lines of the table"),
        flag("--doubled-seeds", type=positive, default=1, help="seeds of the lines with twice the rate"),
    )
    columns = (
        Column("network", same("network")),
        Column("layers", same("line")),
        Column("seeds", runner.count),
        Column("top-1, mean %", mean("top1")),
        Column("± std", runner.spread),
        Column("against mus", _against_mus),
        Column("training loss", mean("train_loss", ".4f")),
        Column("not finite", lambda found, _: str(sum(not math.isfinite(o.train_loss) for o in found))),
    )

    def check(self) -> None:
        """Reads the recipes."""
        paths = {_recipe(network, line) for network in self.args.networks for line in self.args.runs}
        self.recipes = {path: read_recipe(path, self.args.data_dir) for path in paths}

    def outcomes(self) -> Iterator[Outcome]:
        """A whole comparison of all networks first, then the next seed."""
        args = self.args
        wanted = [
            self._run(network, line, seed)
            for index, seed in enumerate(args.seeds)
            for network in args.networks
            for line in args.runs
            if not line.endswith(DOUBLED) or index < args.doubled_seeds
        ]
        yield from at_once(args.jobs, Run.outcome, wanted)

    def _run(self, network: str, line: str, seed: int) -> Run:
        images, recipe = self.args.images, _recipe(network, line)
        options = self.recipes[recipe]
        epochs, data = self.args.epochs or options.epochs, parts(options, self.output, images)
        more = ["--data-dir", str(data), "--seed", str(seed)]
        if layers := VARIANTS[line.removesuffix(f"-{DOUBLED}")]:  # for conversion, or of a network made of them
            more += ["--layers", layers] if options.layers else ["--model-kwargs", f"layers={layers}"]
        lr = options.lr or math.nan
        if line.endswith(DOUBLED):
            lr *= 2
            more += ["--lr", str(lr)]
        name = f"{network}-{line}-{images}x{epochs}-seed{seed}-{digest_of(options, data)}"
        return Run(network, line, seed, Stage(name, recipe, self.output, epochs, tuple(more)), lr)

    def line(self, outcome: Outcome) -> tuple[str, str]:
        """Network and layers."""
        return outcome.network, outcome.line

    def draw(self, figure: Any, done: Outcomes) -> None:
        """The training losses of all runs, and their final accuracies, a row of panels per network."""
        networks = list(dict.fromkeys(each.network for each in done))
        figure.set_size_inches(11, 4.2 * len(networks))
        axes = figure.subplots(len(networks), 2, squeeze=False, width_ratios=(3, 2))
        for (left, right), network in zip(axes, networks, strict=True):
            _draw_network(left, right, [each for each in done if each.network == network])
            left.set(xlabel="epoch", ylabel="training loss", title=f"{network} on CIFAR-10, {self.args.images} images")
            left.xaxis.get_major_locator().set_params(integer=True)
            left.legend(fontsize="small")
            right.set(ylabel="validation top-1, %", title="after the last epoch, every seed")
            for axis in (left, right):
                axis.grid(alpha=0.3)


def _draw_network(left: Any, right: Any, done: Outcomes) -> None:
    present = [line for line in LINES if any(each.line == line for each in done)]
    for number, line in enumerate(present):
        found = [each for each in done if each.line == line]
        for each in found:
            losses = each.curves.get("train_loss", [])
            style = {"color": f"C{number}", "alpha": 0.8, "linestyle": "--" if line.endswith(DOUBLED) else "-"}
            label = line if each is found[0] else None
            if losses:
                left.plot(range(1, len(losses) + 1), losses, linewidth=1.2, label=label, **style)
            right.plot([number], [each.top1], "o", color=f"C{number}", alpha=0.7)
    right.set_xticks(range(len(present)), present, rotation=20, ha="right", fontsize="small")


if __name__ == "__main__":
    sys.exit(Table.main())
