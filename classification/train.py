"""Trains any timm model, revnets' own included, from a YAML file and the command line.

python classification/train.py --config configs/classification/quickstart.yaml
torchrun --nproc_per_node=2 classification/train.py --data-dir /data/imagenet --model revbifpn_s1 --amp
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

if not __package__:  # run by its path: Python then looks for modules in classification/ instead of the project's root
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "classification"

from timm.utils import random_seed

from revnets.training.errors import guarded
from revnets.training.memory import memory_words
from revnets.training.options.parsing import SEED, joined, read_layers, settled
from revnets.training.progress import clock

from .images.data import Splits
from .networks.network import Network
from .options import CONFIGS, TrainOptions
from .run.captured import check_capture
from .run.journal import Journal
from .run.loop import train_epoch, validate
from .run.recovery import Position
from .run.report import Row
from .run.resuming import Asked
from .run.start import start_training
from .run.training import Training
from .runtime import start_runtime

_logger = logging.getLogger("classification")
DESCRIPTION = "Train a timm model on images. Options keep the names of timm's own train.py."


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ended with."""

    folder: Path
    best_epoch: int | None
    best_metric: float | None
    rows: list[Row]


def main(argv: Sequence[str] | None = None, program: str = "") -> int:
    """Runs the script; returns its exit code: 2 after a user mistake.

    Args:
        argv: The arguments, `sys.argv[1:]` where None.
        program: What was typed before them, where it was not the script.
    """

    def run() -> Result:
        layers = read_layers(TrainOptions, argv, DESCRIPTION, prog=program, ours=CONFIGS)
        return train(settled(TrainOptions, layers), joined(layers))

    return guarded(run, program)


def train(options: TrainOptions, given: Collection[str] | None = None) -> Result:
    """Trains as the options say.

    Args:
        options: All options.
        given: Names of those that somebody set; None: of those that are not at their default.

    Returns:
        The run's folder and its figures.

    Raises:
        UserError: A mistake in the options, the data or a checkpoint.
    """
    options.check()
    runtime = start_runtime(options)
    check_capture(options, runtime)
    random_seed(options.seed, 0)  # the same weights in every process
    splits = Splits.of(options)
    options = splits.counted(options)
    network = Network.of(options, runtime)
    run = start_training(options, runtime, network, splits)
    with contextlib.ExitStack() as held:
        journal = Journal(run, network, splits, Asked.of(options, given), held)
        run.guard.start()
        with run.recovery.termination:
            _epochs(run, journal)
        journal.finish()
    saver = journal.saver
    if saver is None:
        return Result(journal.folder, None, None, [])
    return Result(journal.folder, saver.best_epoch, saver.best_metric, journal.summary.rows)


def _epochs(run: Training, journal: Journal) -> None:
    """All epochs: train, validate, change the learning rate, write summary and checkpoint."""
    options, runtime, begin, start = run.options, run.runtime, journal.begin, time.perf_counter()
    epochs = range(begin.epoch, run.epochs)
    for epoch in epochs:
        random_seed(epoch_seed(options.seed, epoch), runtime.rank)  # so that a resumed run draws the same numbers
        figures, end = train_epoch(run, begin if epoch == begin.epoch else Position(epoch))
        lr = max(group["lr"] for group in run.optimizer.param_groups)
        row: Row = {"epoch": float(epoch), **{f"train_{name}": value for name, value in figures.items()}}
        row.update(journal.flops.after((epoch + 1) * run.updates_per_epoch))
        metrics: dict[str, float] = {}
        if (epoch + 1) % options.val_interval == 0 or epoch == epochs[-1]:
            metrics = _validated(run, end)
        row.update({f"eval_{name}": value for name, value in metrics.items()})
        metric = metrics.get(options.eval_metric)
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)
        processes = run.recovery.own.gather(Position(epoch + 1)) if run.recovery.own is not None else []
        journal.add(epoch, {**row, "lr": lr}, metric, processes)
        if runtime.primary:
            done = epoch - epochs[0] + 1
            rest = (time.perf_counter() - start) / done * (len(epochs) - done)
            _logger.info(_epoch_words(row, lr, epoch, 100 * (epoch + 1) / epochs.stop, rest))


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch, in the 32 bits that NumPy takes, with room for the number of the process."""
    return (seed + 1000003 * (epoch + 1)) % (SEED - 0xFFFF)


def _epoch_words(row: Row, lr: float, epoch: int, share: float, rest: float) -> str:
    memory = memory_words({name.removeprefix("train_"): v for name, v in row.items() if name.endswith("_mb")})
    words = f"epoch {epoch} ({share:.0f}% of the run, ETA {clock(rest)}): train loss {row['train_loss']:.4f}"
    if "eval_loss" in row:
        words += f", val loss {row['eval_loss']:.4f}, top-1 {row['eval_top1']:.2f}%"
    if row.get("train_skipped"):
        words += f", {row['train_skipped']:.0f} updates skipped since the start"
    return f"{words}, lr {lr:.2e}, {row['train_images_per_s']:,.0f} images/s, {memory}"


def _validated(run: Training, end: Position) -> dict[str, float]:
    """Validation of the weights or, where there is an EMA, of it, with the plain weights' figures as `raw_...`."""
    options, runtime, epoch = run.options, run.runtime, end.epoch
    every, check = options.log_interval, functools.partial(run.recovery.check, lambda: end, end.step)
    model, loader = run.plain, run.validation
    runtime.share_statistics(model, options.dist_bn)
    wanted = ("loss", "top1", "top5")
    plain = validate(model, loader, runtime, f"validate {epoch}", every, check)
    metrics = {name: plain[name] for name in wanted}
    if run.ema is not None and not options.model_ema_force_cpu:
        runtime.share_statistics(run.ema, options.dist_bn)
        ema = validate(run.ema.module, loader, runtime, f"validate {epoch} (EMA)", every, check)
        metrics = {name: ema[name] for name in wanted} | {f"raw_{name}": plain[name] for name in wanted}
    return metrics


if __name__ == "__main__":
    sys.exit(main())
