"""Dense against the sparse members, and schedule against schedule, over seeds: same FLOPs, same recipe, one table.

python -m classification.sparse_table --images 10000 --jobs 2
python -m classification.sparse_table --seeds 0 --runs dense sparse_wide-rigl --images 500 --epochs 1

Every run is a process of train.py with one thread; finished runs are skipped and broken ones go on where they stopped.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from classification.config import Parser, parse
from classification.errors import UserError, guarded, whole_file
from classification.options import TrainOptions, as_dict
from classification.report import read_summary
from revnets.sparsity.masks import check_sparsity

_logger = logging.getLogger("classification")
ROOT = Path(__file__).resolve().parents[1]
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
    parser = Parser(prog="sparse_table", description="Seeds x members x schedules on one recipe.", allow_abbrev=False)
    parser.add_argument("--config", default=str(CONFIG), help="recipe of all runs")
    parser.add_argument("--output", default="output/sparse_table", help="folder of the runs and of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=_sparsity, default=0.75)
    parser.add_argument("--compared", choices=MEMBERS, default="sparse_wide", help="member with every schedule")
    parser.add_argument("--runs", nargs="+", help="lines of the table; all where not given")
    parser.add_argument("--images", type=_positive, default=10000, help="training images, equally many of each class")
    parser.add_argument("--epochs", type=_positive, help="those of the recipe where not given")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at the same time")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given where a whole number from 1 was expected")
    return int(text)


def _sparsity(text: str) -> float:
    try:
        return check_sparsity(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} was given where a number from 0 up to, not including, 1 was expected"
        ) from None


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
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"--output: '{output}' cannot be written ({error.strerror}); give another folder.") from error
    described = {**as_dict(options), "data_dir": str(Path(options.data_dir).resolve())}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]  # of recipe and data
    made = output / f"data-{args.images}-{digest}"
    data = subset(Path(options.data_dir), options.train_split, options.val_split, args.images, made)
    wanted = [(line, seed) for seed in args.seeds for line in lines]  # a whole comparison first, then the next seed
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda pair: _train(args, data, epochs, digest, *pair), wanted))
    write_table(done, output / "table.csv")
    draw_table(done, output / "table.png", f"{options.model}, {args.images} images, {epochs} epochs")
    Console().print(as_table(done))
    return done


def subset(folder: Path, train: str, validation: str, images: int, made: Path) -> Path:
    """A folder with the first images of every class of a .tar split, and the whole validation split.

    Args:
        folder: Of the two splits.
        train: File name of the training images.
        validation: File name of the validation images.
        images: How many to take, equally many of each class.
        made: The folder; its parent exists.

    Raises:
        UserError: The splits are no .tar files, or hold too few images.
    """
    for split in (train, validation):
        if not (folder / split).is_file():
            raise UserError(f"--config: there is no .tar file '{folder / split}'; correct data_dir and the splits.")
    made.mkdir(exist_ok=True)
    link = made / validation
    if not link.exists():
        link.symlink_to((folder / validation).resolve())
    if (made / train).exists():
        return made
    with tarfile.open(folder / train) as source, whole_file(made / train) as path:
        members = sorted((m for m in source if m.isfile()), key=lambda m: m.name)
        classes: dict[str, list[tarfile.TarInfo]] = {}
        for member in members:
            classes.setdefault(str(Path(member.name).parent), []).append(member)
        each, fewest = images // len(classes), min(map(len, classes.values()))
        if not 0 < each <= fewest:
            allowed = f"{len(classes)} to {len(classes) * fewest}"
            raise UserError(f"--images: {images} was given where {allowed} were expected, equally many of each class.")
        with tarfile.open(path, "w") as target:
            for member in (m for found in classes.values() for m in found[:each]):
                target.addfile(member, source.extractfile(member))
    return made


def _train(args: argparse.Namespace, data: Path, epochs: int, digest: str, line: str, seed: int) -> Outcome:
    name = f"{line}-{args.sparsity:g}-{args.images}x{epochs}-seed{seed}-{digest}"
    folder = Path(args.output) / name
    if (found := _outcome(folder, epochs, line, seed)) is not None:
        return found
    command = [sys.executable, "-m", "classification.train", "--config", args.config, "--data-dir", str(data)]
    command += ["--output", args.output, "--experiment", name, "--resume", "auto", "--seed", str(seed)]
    command += ["--epochs", str(epochs), "--val-interval", str(epochs)]
    if line != "dense":
        member, schedule = line.rsplit("-", 1)
        command += ["--layers", f"{member}:{args.sparsity:g}", "--sparsity-schedule", schedule]
    _logger.info(f"{name}: started")
    with (Path(args.output) / f"{name}.log").open("a") as log:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=Path.cwd(), env=env).returncode
    found = _outcome(folder, epochs, line, seed)
    if code or found is None:
        raise UserError(f"{name}: the run ended with code {code}; '{args.output}/{name}.log' says why.")
    _logger.info(f"{name}: top-1 {found.top1:.2f}%")
    return found


def _outcome(folder: Path, epochs: int, line: str, seed: int) -> Outcome | None:
    path = folder / "summary.csv"
    row = read_summary(path)[-1] if path.exists() else {}
    if row.get("epoch") != epochs - 1 or "eval_top1" not in row:
        return None
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


def write_table(outcomes: Sequence[Outcome], path: Path) -> None:
    """Writes one row per run."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Outcome)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(each) for each in outcomes)


def draw_table(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Draws every run as a point and every mean as a bar; says so where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _logger.info(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis: Any = figure.subplots()
    lines = grouped(outcomes)
    for i, found in enumerate(lines.values()):
        axis.plot([i] * len(found), [o.top1 for o in found], "o", color="C0", alpha=0.6)
        mean = statistics.mean(o.top1 for o in found)
        axis.plot([i - 0.3, i + 0.3], [mean, mean], color="C1", linewidth=2)
    axis.set_xticks(range(len(lines)), list(lines), rotation=20, ha="right", fontsize="small")
    axis.set(title=title, ylabel="top-1, %")
    axis.grid(axis="y", alpha=0.3)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


if __name__ == "__main__":
    sys.exit(main())
