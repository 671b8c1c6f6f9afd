"""Trains any timm model, revnets' own included, from a YAML file and the command line.

python classification/train.py --config configs/classification/quickstart.yaml
torchrun --nproc_per_node=2 classification/train.py --data-dir /data/imagenet --model revbifpn_s1 --amp
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: Python then looks for modules in classification/ instead of the project's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn, random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import revnets  # noqa: F401  (registers its models with timm)
from classification.checkpoints import PATTERN, Saver, newest, resume
from classification.config import parse
from classification.data import (
    check_labels,
    check_same_classes,
    class_names,
    open_dataset,
    train_data,
    validation_loader,
)
from classification.distill import distillation
from classification.errors import UserError, did_you_mean, guarded, one_line
from classification.loop import Training, train_epoch, validate
from classification.models import build_model, check_model_fits, data_config
from classification.options import TrainOptions, as_dict
from classification.report import SUMMARY, Row, Summary, clock, draw_curves, write_args
from classification.runtime import Runtime, memory_words, start_runtime
from classification.sparse import FILES as SPARSITY_FILES
from classification.sparse import TrainingFlops, draw_sparsity, sparsity_words, start_sparsity
from classification.start import FLOPS, load_start
from revnets.sparsity.report import write_table

_logger = logging.getLogger("classification")
DESCRIPTION = "Train a timm model on images. Options keep the names of timm's own train.py."


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ended with."""

    folder: Path
    best_epoch: int | None
    best_metric: float | None
    rows: list[Row]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 2 after a user mistake."""
    return guarded(lambda: train(parse(TrainOptions, argv, DESCRIPTION, prog="train.py")))


def train(options: TrainOptions) -> Result:
    """Trains as the options say.

    Args:
        options: All options.

    Returns:
        The run's folder and its figures.

    Raises:
        UserError: A mistake in the options, the data or a checkpoint.
    """
    options.check()
    runtime = start_runtime(options)
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
    run, epochs = _training(options, runtime, model, data)
    folder, checkpoint = _start(run, model)
    start_epoch = checkpoint["epoch"] + 1 if checkpoint else 0
    if runtime.distributed:
        run.model = _distributed(run.model, runtime, options)
        if run.task is not None:
            run.task.trainable_module = run.model
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
        )
        if checkpoint:
            saver.restore_history(checkpoint)
        _announce(run, model, folder, len(train_set), len(val_set), start_epoch, epochs)
    summary = Summary(folder, start_epoch)
    images = options.batch_size * runtime.world_size * len(data.loader) / run.updates_per_epoch
    flops = TrainingFlops(model, config["input_size"], run.sparsity, images, flops_before)
    _epochs(run, val_loader, saver, summary, range(start_epoch, epochs), flops)
    return _finish(run, folder, saver, summary, done=start_epoch >= epochs)


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
    check_model_fits(model, config["input_size"], options.num_classes, options.model)
    if options.sync_bn:
        if runtime.device.type == "cpu":
            raise UserError(
                "--sync-bn: torch has it for GPUs only; leave it out, --dist-bn reduce averages the statistics."
            )
        model = convert_sync_batchnorm(model) if runtime.distributed else model
    return model, config, before


def _training(options: TrainOptions, runtime: Runtime, model: nn.Module, data: Any) -> tuple[Training, int]:
    """Optimizer, loss, schedule, loss scaler and EMA; and the number of epochs of the schedule."""
    lr = options.lr if options.lr is not None else _learning_rate(options, runtime)
    if options.opt not in list_optimizers() and options.opt.split("_")[-1] not in list_optimizers():
        hint = did_you_mean(options.opt, list_optimizers())
        raise UserError(
            f"--opt: timm knows no optimizer '{options.opt}'{hint}; timm.optim.list_optimizers() names all."
        )
    more = {"eps": options.opt_eps, "betas": options.opt_betas, "layer_decay": options.layer_decay}
    more = {**{name: value for name, value in more.items() if value is not None}, **options.opt_kwargs}
    try:
        optimizer = create_optimizer_v2(
            model, opt=options.opt, lr=lr, weight_decay=options.weight_decay, momentum=options.momentum, **more
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"--opt: {options.opt} refuses its arguments ({one_line(error)}); correct --opt-kwargs."
        ) from error
    run = Training(options, runtime, model, optimizer, _loss(options), data, None, runtime.scaler(), None)
    try:
        run.scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=options.sched,
            num_epochs=options.epochs,
            decay_epochs=options.decay_epochs,
            decay_milestones=options.decay_milestones,
            cooldown_epochs=options.cooldown_epochs,
            patience_epochs=options.patience_epochs,
            decay_rate=options.decay_rate,
            min_lr=options.min_lr,
            warmup_lr=options.warmup_lr,
            warmup_epochs=options.warmup_epochs,
            warmup_prefix=options.warmup_prefix,
            cycle_mul=options.lr_cycle_mul,
            cycle_decay=options.lr_cycle_decay,
            cycle_limit=options.lr_cycle_limit,
            k_decay=options.lr_k_decay,
            plateau_mode="min" if options.eval_metric == "loss" else "max",
            step_on_epochs=not options.sched_on_updates,
            updates_per_epoch=run.updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"--sched: timm refuses '{options.sched}' ({one_line(error)}); give cosine, say.") from error
    if options.sched != "none" and run.scheduler is None:
        raise UserError(f"--sched: timm knows no schedule '{options.sched}'; give cosine, step, poly or none, say.")
    run.sparsity = start_sparsity(options, model, optimizer, int(epochs) * run.updates_per_epoch)
    if options.teacher or options.teacher_checkpoint:
        run.task = distillation(options, runtime, model, run.loss)
    if options.model_ema:  # a copy of the model, with its masks
        device = torch.device("cpu") if options.model_ema_force_cpu else None
        run.ema = ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup, device=device)
    return run, int(epochs)


def _learning_rate(options: TrainOptions, runtime: Runtime) -> float:
    """timm's rule: the base rate, scaled by the global batch."""
    batch = options.batch_size * runtime.world_size * options.grad_accum_steps
    adaptive = any(name in options.opt for name in ("ada", "lamb"))
    ratio = batch / options.lr_base_size
    scale = options.lr_base_scale or ("sqrt" if adaptive else "linear")
    return options.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def _loss(options: TrainOptions) -> nn.Module:
    """timm's loss for the kind of targets."""
    if options.jsd_loss:
        loss: nn.Module = JsdCrossEntropy(num_splits=options.aug_splits, smoothing=options.smoothing)
    elif options.bce_loss:
        smoothing = 0.0 if options.mixes else options.smoothing
        loss = BinaryCrossEntropy(smoothing=smoothing, target_threshold=options.bce_target_thresh)
    elif options.mixes:
        loss = SoftTargetCrossEntropy()
    elif options.smoothing:
        loss = LabelSmoothingCrossEntropy(smoothing=options.smoothing)
    else:
        loss = nn.CrossEntropyLoss()
    return loss


def _distributed(model: nn.Module, runtime: Runtime, options: TrainOptions) -> nn.Module:
    devices = None if runtime.device.type == "cpu" else [runtime.device]
    more: dict[str, Any] = (
        {"broadcast_buffers": False} if options.no_ddp_bb else {}
    )  # newer torch warns where the default is named
    return DistributedDataParallel(model, device_ids=devices, **more)


def _start(run: Training, model: nn.Module) -> tuple[Path, dict[str, Any] | None]:
    """Finds the run's folder and, when resuming, brings the run back; returns the checkpoint."""
    options = run.options
    folder, path = _folder_and_checkpoint(options, model)
    if run.runtime.distributed:
        torch.distributed.barrier()  # all have looked before one of them writes
    checkpoint = None
    if path is not None:
        optimizer = None if options.no_resume_opt else run.optimizer
        checkpoint = resume(path, options.model, model, optimizer, run.scheduler, run.ema, run.scaler, run.sparsity)
    epoch = checkpoint["epoch"] + 1 if checkpoint else 0
    if run.scheduler is not None and epoch:
        run.scheduler.step(epoch)
        run.scheduler.step_update(epoch * run.updates_per_epoch)
    if run.runtime.primary:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output: '{folder}' cannot be made ({error.strerror}); give a writable folder."
            ) from error
        if checkpoint is None and options.overwrite:
            for old in [*folder.glob(PATTERN), *(folder / name for name in (SUMMARY, "curves.png", *SPARSITY_FILES))]:
                old.unlink(missing_ok=True)
    return folder, checkpoint


def _folder_and_checkpoint(options: TrainOptions, model: nn.Module) -> tuple[Path, Path | None]:
    size = data_config(options, model)["input_size"][-1]
    output = Path(options.output)
    name = options.experiment or f"{options.model.replace('/', '_')}-{size}"
    folder = output / name
    if options.resume == "auto":
        candidates = [folder] if options.experiment else [folder, *output.glob(f"{name}-[0-9]*")]
        found = {path: each for each in candidates if (path := newest(each)) is not None}
        if not found:
            _logger.info(f"--resume auto: no checkpoint in '{folder}', starting from the beginning")
            return folder, None
        latest = max(found, key=lambda path: path.stat().st_mtime_ns)
        return found[latest], latest
    path = Path(options.resume) if options.resume else None
    if path is not None and path.resolve().parent == folder.resolve():
        return folder, path
    if not options.overwrite and _holds_run(folder):
        if options.experiment:
            raise UserError(
                f"--experiment: '{folder}' already holds a run; add --resume auto to go on with it, "
                "--overwrite to start anew, or give another name."
            )
        number = 1
        while _holds_run(folder := output / f"{name}-{number}"):
            number += 1
    return folder, path


def _holds_run(folder: Path) -> bool:
    return (folder / SUMMARY).exists() or newest(folder) is not None


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
    run: Training, val_loader: Any, saver: Saver | None, summary: Summary, epochs: range, flops: TrainingFlops
) -> None:
    """All epochs: train, validate, change the learning rate, write summary and checkpoint."""
    options, runtime, start = run.options, run.runtime, time.perf_counter()
    for epoch in epochs:
        random_seed(options.seed + 1000003 * (epoch + 1), runtime.rank)  # so that a resumed run draws the same numbers
        lr = max(group["lr"] for group in run.optimizer.param_groups)
        row: Row = {"epoch": float(epoch)}
        row.update({f"train_{name}": value for name, value in train_epoch(run, epoch).items()})
        row.update(flops.after((epoch + 1) * run.updates_per_epoch))
        metrics: dict[str, float] = {}
        if (epoch + 1) % options.val_interval == 0 or epoch == epochs[-1]:
            metrics = _validated(run, val_loader, epoch)
        row.update({f"eval_{name}": value for name, value in metrics.items()})
        metric = metrics.get(options.eval_metric)
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)
        if saver is not None:
            saver.extra = {FLOPS: row.get("train_flops_all_phases", row.get("train_flops", 0.0))}
            summary.add({**row, "lr": lr})  # the row first: a kill in between repeats the epoch and its row
            saver.save_checkpoint(epoch, metric=metric)
            if run.sparsity is not None:
                write_table(run.sparsity, Path(saver.checkpoint_dir))
            done = epoch - epochs[0] + 1
            rest = (time.perf_counter() - start) / done * (len(epochs) - done)
            _logger.info(_epoch_words(row, lr, epoch, 100 * (epoch + 1) / epochs.stop, rest))


def _epoch_words(row: Row, lr: float, epoch: int, share: float, rest: float) -> str:
    memory = memory_words({name.removeprefix("train_"): v for name, v in row.items() if name.endswith("_mb")})
    words = f"epoch {epoch} ({share:.0f}% of the run, ETA {clock(rest)}): train loss {row['train_loss']:.4f}"
    if "eval_loss" in row:
        words += f", val loss {row['eval_loss']:.4f}, top-1 {row['eval_top1']:.2f}%"
    return f"{words}, lr {lr:.2e}, {row['train_images_per_s']:,.0f} images/s, {memory}"


def _validated(run: Training, loader: Any, epoch: int) -> dict[str, float]:
    """Validation of the weights or, where there is an EMA, of it, with the plain weights' figures as `raw_...`."""
    options, runtime = run.options, run.runtime
    model = run.model.module if isinstance(run.model, DistributedDataParallel) else run.model
    if runtime.distributed and options.dist_bn != "none":
        distribute_bn(model, runtime.world_size, options.dist_bn == "reduce")
    wanted = ("loss", "top1", "top5")
    plain = validate(model, loader, runtime, f"validate {epoch}", options.log_interval)
    metrics = {name: plain[name] for name in wanted}
    if run.ema is not None and not options.model_ema_force_cpu:
        if runtime.distributed and options.dist_bn != "none":
            distribute_bn(run.ema, runtime.world_size, options.dist_bn == "reduce")
        ema = validate(run.ema.module, loader, runtime, f"validate {epoch} (EMA)", options.log_interval)
        metrics = {name: ema[name] for name in wanted} | {f"raw_{name}": plain[name] for name in wanted}
    return metrics


def _finish(run: Training, folder: Path, saver: Saver | None, summary: Summary, done: bool) -> Result:
    options = run.options
    if saver is None:
        return Result(folder, None, None, [])
    if done:
        _logger.info(f"'{folder}' is already trained for its {options.epochs} epochs; raise --epochs to go on")
    if run.sparsity is not None:
        draw_sparsity(run.sparsity, folder, f"{options.model} · {folder.name} · {options.sparsity_schedule}")
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
    picture = draw_curves(folder, summary.rows, f"{options.model} · {folder.name}") if summary.rows else None
    if saver.best_metric is not None:
        _logger.info(
            f"best {options.eval_metric} {saver.best_metric:.2f} at epoch {saver.best_epoch}; "
            f"weights in '{folder / 'model_best.pth.tar'}'" + (f", curves in '{picture}'" if picture else "")
        )
    return Result(folder, saver.best_epoch, saver.best_metric, summary.rows)


if __name__ == "__main__":
    sys.exit(main())
