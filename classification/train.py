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
from typing import Any

if not __package__:  # run by its path: Python then looks for modules in classification/ instead of the project's root
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "classification"

from timm.layers import convert_sync_batchnorm
from timm.utils import random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from revnets.numerics import NumericsMonitor
from revnets.pruning.checkpoint import FLOPS
from revnets.training.captions import caption
from revnets.training.errors import UserError, guarded
from revnets.training.mask_report import write_table
from revnets.training.memory import memory_words
from revnets.training.options.parsing import SEED, joined, options_of, read_layers, settled
from revnets.training.processes import of_first, settle_buckets
from revnets.training.progress import clock

from .captured import check_capture
from .checkpoints import LAST, Saver
from .data import check_labels, check_same_classes, class_names, open_dataset, train_data, validation_loader
from .folder import RunFolder
from .loop import Training, train_epoch, validate
from .models import build_model, check_batch_fits, check_model_fits, data_config
from .options import CONFIGS, TrainOptions, as_dict
from .recovery import OwnState, Position
from .report import Row, Summary, draw_curves, write_args
from .resuming import Asked, resume
from .runtime import Runtime, start_runtime
from .setup import start_training
from .sources import check_apart
from .sparse import RunFlops, draw_sparsity, sparsity_words
from .start import load_start
from .trial import try_transforms

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
        layers = read_layers(TrainOptions, argv, DESCRIPTION, prog=program or "train.py", ours=CONFIGS)
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
    if given is None:
        given = [each.name for each in options_of(TrainOptions).values() if getattr(options, each.name) != each.default]
    with contextlib.ExitStack() as held:
        return _train(options, given, held)


def _train(options: TrainOptions, given: Collection[str], held: contextlib.ExitStack) -> Result:
    options.check()
    runtime = start_runtime(options)
    check_capture(options, runtime)
    check_apart(options)
    random_seed(options.seed, 0)  # the same weights in every process
    train_set = open_dataset(
        options, options.train_split, training=True, repeats=options.epoch_repeats, seed=options.seed
    )
    val_set = open_dataset(options, options.val_split, training=False)
    check_same_classes(train_set, val_set)
    names = class_names(train_set)
    if options.num_classes is None and names is not None:
        options = dataclasses.replace(options, num_classes=len(names))
    model, config, flops_before = _model(options, runtime)
    num_classes = options.num_classes or int(getattr(model, "num_classes", 1000))
    check_labels(train_set, num_classes)
    data = train_data(options, runtime, train_set, config, num_classes)
    val_loader = validation_loader(options, runtime, val_set, config)
    for dataset in (data.loader.dataset, val_loader.dataset):
        try_transforms(dataset, "L" if config["input_size"][0] == 1 else "RGB", config["input_size"][-2:])
    run, epochs = start_training(options, runtime, model, data)
    folder, path, checkpoint, begin = _start(run, model, given, held)
    if runtime.distributed:
        run.model = _distributed(run.model, runtime, options)
        if run.task is not None:
            run.task.trainable_module = run.model
    run.recovery.own = OwnState(runtime, model, run.ema)
    if checkpoint is not None:
        begin = run.recovery.own.restore(checkpoint, begin)
    decreasing = options.eval_metric == "loss"
    saver = None
    if runtime.primary:
        write_args(folder, as_dict(options))
        saver = Saver(
            run.model,
            run.optimizer,
            as_dict(options),
            run.scheduler,
            run.ema,
            run.scaler,
            run.sparsity,
            folder,
            decreasing,
            options.checkpoint_hist,
            run.guard,
        )
        if checkpoint is not None and path is not None:
            in_place = path.parent.resolve() == folder.resolve()
            saver.restore_history(checkpoint, path, in_place and (options.resume == "auto" or path.name == LAST))
        run.recovery.saver = saver
        _announce(run, model, folder, len(train_set), len(val_set), begin.epoch, epochs)
        if options.numerics_interval:
            run.numerics = NumericsMonitor(model, options.numerics_interval)
            run.numerics.resume(folder, run.updates_before(begin))
    summary = Summary(folder, begin.epoch)
    images = options.batch_size * runtime.world_size * len(data.loader) / run.updates_per_epoch
    flops = RunFlops(model, config["input_size"], run.sparsity, images, flops_before)
    run.guard.start()
    with run.recovery.termination:
        _epochs(run, val_loader, saver, summary, begin, epochs, flops)
    return _finish(run, folder, saver, summary, flops, done=begin.epoch >= epochs)


def _model(options: TrainOptions, runtime: Runtime) -> tuple[nn.Module, dict[str, Any], float]:
    """The model on its device, checked, with its data configuration and the FLOPs that its weights cost so far."""
    model = build_model(options)
    before = load_start(options, model)
    if options.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise UserError(f"--grad-checkpointing: {options.model} has no such switch; leave it out.") from error
    model.to(device=runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]
    config = data_config(options, model)
    check_batch_fits(options.batch_size, config["input_size"], runtime.device)
    check_model_fits(model, config["input_size"], options.num_classes, options.model)
    if options.sync_bn:
        if runtime.device.type == "cpu":
            raise UserError(
                "--sync-bn: torch has it for GPUs only; leave it out, --dist-bn reduce averages the statistics."
            )
        model = convert_sync_batchnorm(model) if runtime.distributed else model
    return model, config, before


def _distributed(model: nn.Module, runtime: Runtime, options: TrainOptions) -> nn.Module:
    devices = None if runtime.device.type == "cpu" else [runtime.device]
    more: dict[str, Any] = (
        {"broadcast_buffers": False} if options.no_ddp_bb else {}
    )  # newer torch warns where the default is named
    model = DistributedDataParallel(model, device_ids=devices, **more)
    settle_buckets(model)
    return model


def _start(
    run: Training, model: nn.Module, given: Collection[str], held: contextlib.ExitStack
) -> tuple[Path, Path | None, dict[str, Any] | None, Position]:
    """Takes the run's folder and, when resuming, brings the run back; returns the checkpoint and where it was.

    The first process alone has the folder; what keeps it from it, all learn of.
    """
    options, mine = run.options, []

    def take() -> tuple[Path, Path | None]:
        mine.append(RunFolder(options, data_config(options, model)["input_size"][-1]))
        held.callback(mine[0].close)
        return mine[0].path, mine[0].checkpoint

    folder, path = of_first(take)
    checkpoint, begin = None, Position(0)
    if path is not None:
        optimizer = None if options.no_resume_opt else run.optimizer
        parts = (optimizer, run.scheduler, run.ema, run.scaler, run.sparsity, run.guard)
        asked = Asked(options, given)
        checkpoint = resume(path, options.model, model, *parts, steps=len(run.data.loader), asked=asked)
        begin = Position.of(checkpoint, len(run.data.loader))
    if run.scheduler is not None and (begin.epoch or begin.step):
        if begin.epoch:
            run.scheduler.step(begin.epoch)
        run.scheduler.step_update(run.updates_before(begin))
    of_first(lambda: mine[0].clear())
    return folder, path, checkpoint, begin


def _announce(
    run: Training, model: nn.Module, folder: Path, images: int, held_out: int, start: int, epochs: int
) -> None:
    options, runtime = run.options, run.runtime
    parameters = sum(p.numel() for p in model.parameters())
    precision = str(runtime.amp_dtype).removeprefix("torch.") if runtime.amp_dtype else "float32"
    _logger.info(
        f"{options.model} ({parameters:,} parameters, {options.num_classes} classes) on {runtime.world_size} x "
        f"{runtime.device.type}, {precision}; {images:,} training and {held_out:,} validation images; epochs "
        f"{start} to {epochs - 1} of {run.updates_per_epoch} updates; results in '{folder}'"
    )
    if run.sparsity is not None:
        _logger.info(sparsity_words(run.sparsity))


def _epochs(
    run: Training,
    val_loader: Any,
    saver: Saver | None,
    summary: Summary,
    begin: Position,
    stop: int,
    flops: RunFlops,
) -> None:
    """All epochs: train, validate, change the learning rate, write summary and checkpoint."""
    options, runtime, start, epochs = run.options, run.runtime, time.perf_counter(), range(begin.epoch, stop)
    for epoch in epochs:
        random_seed(epoch_seed(options.seed, epoch), runtime.rank)  # so that a resumed run draws the same numbers
        row: Row = {"epoch": float(epoch)}
        figures, end = train_epoch(run, begin if epoch == begin.epoch else Position(epoch))
        lr = max(group["lr"] for group in run.optimizer.param_groups)
        row.update({f"train_{name}": value for name, value in figures.items()})
        row.update(flops.after((epoch + 1) * run.updates_per_epoch))
        metrics: dict[str, float] = {}
        if (epoch + 1) % options.val_interval == 0 or epoch == epochs[-1]:
            metrics = _validated(run, val_loader, end)
        row.update({f"eval_{name}": value for name, value in metrics.items()})
        metric = metrics.get(options.eval_metric)
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)
        processes = run.recovery.own.gather(Position(epoch + 1)) if run.recovery.own is not None else []
        if saver is not None:
            saver.extra = {FLOPS: row.get("train_flops_all_phases", row.get("train_flops", 0.0))}
            summary.add({**row, "lr": lr})  # the row first: a kill in between repeats the epoch and its row
            saver.save_checkpoint(epoch, metric, processes)
            if run.sparsity is not None:
                write_table(run.sparsity, Path(saver.checkpoint_dir))
            if run.numerics is not None and run.numerics.records:
                run.numerics.save(Path(saver.checkpoint_dir), options.model)
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


def _validated(run: Training, loader: Any, end: Position) -> dict[str, float]:
    """Validation of the weights or, where there is an EMA, of it, with the plain weights' figures as `raw_...`."""
    options, runtime, epoch = run.options, run.runtime, end.epoch
    every, check = options.log_interval, functools.partial(run.recovery.check, lambda: end, end.step)
    model = run.model.module if isinstance(run.model, DistributedDataParallel) else run.model
    runtime.share_statistics(model, options.dist_bn)
    wanted = ("loss", "top1", "top5")
    plain = validate(model, loader, runtime, f"validate {epoch}", every, check)
    metrics = {name: plain[name] for name in wanted}
    if run.ema is not None and not options.model_ema_force_cpu:
        runtime.share_statistics(run.ema, options.dist_bn)
        ema = validate(run.ema.module, loader, runtime, f"validate {epoch} (EMA)", every, check)
        metrics = {name: ema[name] for name in wanted} | {f"raw_{name}": plain[name] for name in wanted}
    return metrics


def _finish(run: Training, folder: Path, saver: Saver | None, summary: Summary, flops: RunFlops, done: bool) -> Result:
    options = run.options
    if saver is None:
        return Result(folder, None, None, [])
    if done:
        _logger.info(f"'{folder}' is already trained for its {options.epochs} epochs; raise --epochs to go on")
    title = caption(f"{options.model} · {folder.name}")
    if run.sparsity is not None:
        flops_of_all = flops.report(run.sparsity.steps)
        draw_sparsity(run.sparsity, flops_of_all, folder, f"{title} · {options.sparsity_schedule}")
    if summary.rows and "train_flops" in summary.rows[-1]:
        last = summary.rows[-1]
        recomputed = last.get("train_flops_recomputed", 0)
        _logger.info(f"training FLOPs, by schedule: {last['train_flops']:.4g}, of which {recomputed:.4g} recomputed")
        if "train_flops_all_phases" in last:
            earlier = last["train_flops_all_phases"] - last["train_flops"]
            _logger.info(
                f"with the trainings before it: {earlier:.4g} + {last['train_flops']:.4g} = "
                f"{last['train_flops_all_phases']:.4g} FLOPs"
            )
    picture = draw_curves(folder, summary.rows, title) if summary.rows else None
    if saver.best_metric is not None:
        _logger.info(
            f"best {options.eval_metric} {saver.best_metric:.2f} at epoch {saver.best_epoch}; "
            f"weights in '{folder / 'model_best.pth.tar'}'" + (f", curves in '{picture}'" if picture else "")
        )
    return Result(folder, saver.best_epoch, saver.best_metric, summary.rows)


if __name__ == "__main__":
    sys.exit(main())
