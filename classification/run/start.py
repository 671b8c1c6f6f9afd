"""What a run trains with: optimizer, loss, schedule, loss scaler and EMA, as the options say."""

from __future__ import annotations

from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

import revnets
from revnets.training.errors import UserError, did_you_mean, one_line, refused
from revnets.training.guards.drift import DriftMonitor
from revnets.training.guards.finite import FiniteGuard

from ..images.data import Splits, check_labels, train_data, validation_loader
from ..networks.distill import distillation
from ..networks.network import Network
from ..networks.sparse import start_sparse_kernel, start_sparsity
from ..options import TrainOptions, renamed
from ..runtime import Runtime
from .budget import fit_memory
from .captured import check_optimizer
from .recovery import Recovery
from .training import Training
from .trial import try_optimizer, try_schedule, try_step, try_transforms


def start_training(options: TrainOptions, runtime: Runtime, network: Network, splits: Splits) -> Training:
    """Loaders, optimizer, loss, schedule, loss scaler, masks and EMA: a run that can begin.

    Args:
        options: All options.
        runtime: Device and processes.
        network: To train.
        splits: To train and validate on.

    Raises:
        UserError: The data, or timm, cannot do what an option asks for.
    """
    model, size = network.model, network.config["input_size"]
    check_labels(splits.training, network.num_classes)
    data = train_data(options, runtime, splits.training, network.config, network.num_classes)
    validation = validation_loader(options, runtime, splits.validation, network.config)
    for dataset in (data.loader.dataset, validation.dataset):
        try_transforms(dataset, "L" if size[0] == 1 else "RGB", size[-2:])
    lr = options.lr if options.lr is not None else _learning_rate(options, runtime)
    optimizer, loss = _optimizer(options, runtime, model, lr), _loss(options)
    recovery = Recovery(runtime, options.recovery_interval, data.batches is not None)
    fit_memory(options, runtime, model, optimizer, size)
    try_step(options, runtime, model, loss, size)
    run = Training(
        options=options,
        runtime=runtime,
        model=model,
        optimizer=optimizer,
        loss=loss,
        data=data,
        validation=validation,
        scaler=runtime.scaler(),
        recovery=recovery,
        guard=FiniteGuard(model, options.nonfinite_limit),
        drift=DriftMonitor(model, options.drift_interval),
    )
    _schedule(run, lr)
    start_sparse_kernel(options, model, runtime.device)
    run.sparsity = start_sparsity(options, model, optimizer, run.epochs * run.updates_per_epoch)
    if options.teacher or options.teacher_checkpoint:
        run.task = distillation(options, runtime, model, run.loss)
    if options.model_ema:  # a copy of the model, with its masks
        device = torch.device("cpu") if options.model_ema_force_cpu else None
        run.ema = ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup, device=device)
    return run


def _optimizer(options: TrainOptions, runtime: Runtime, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if options.opt not in list_optimizers() and options.opt.split("_")[-1] not in list_optimizers():
        hint = did_you_mean(options.opt, list_optimizers())
        raise UserError(
            f"--opt: timm knows no optimizer '{options.opt}'{hint}; timm.optim.list_optimizers() names all."
        )
    more = {"eps": options.opt_eps, "betas": options.opt_betas, "layer_decay": options.layer_decay}
    arguments: dict[str, Any] = {
        "opt": options.opt,
        "lr": lr,
        "weight_decay": options.weight_decay,
        "momentum": options.momentum,
        **{name: value for name, value in more.items() if value is not None},
        **options.opt_kwargs,
    }
    try_optimizer(options, runtime, arguments)
    trained = _trained(model, options, lr)
    with refused(f"--opt: {options.opt} refuses its arguments", "correct --opt-kwargs or --layer-decay"):
        optimizer: torch.optim.Optimizer = create_optimizer_v2(trained, **arguments)
    check_optimizer(options, optimizer, model)
    return optimizer


def _schedule(run: Training, lr: float) -> None:
    """Gives a run its schedule, and the number of epochs of that."""
    options, updates = run.options, run.updates_per_epoch
    arguments = schedule_arguments(options, updates)
    with refused(f"--sched: timm refuses '{options.sched}'", "give cosine, say"):
        run.scheduler, epochs = create_scheduler_v2(run.optimizer, **arguments)
        run.epochs = int(epochs)
    if options.sched != "none" and run.scheduler is None:
        raise UserError(f"--sched: timm knows no schedule '{options.sched}'; give cosine, step, poly or none, say.")
    try_schedule(options, lr, arguments, updates)


def schedule_arguments(options: TrainOptions, updates: int) -> dict[str, Any]:
    """The arguments of `create_scheduler_v2`."""
    same = ("sched", "decay_epochs", "decay_milestones", "decay_rate", "cooldown_epochs", "patience_epochs", "min_lr")
    cycles = {"cycle_mul": "lr_cycle_mul", "cycle_decay": "lr_cycle_decay", "cycle_limit": "lr_cycle_limit"}
    return {
        **renamed(options, *same, "warmup_lr", "warmup_epochs", "warmup_prefix"),
        **renamed(options, num_epochs="epochs", k_decay="lr_k_decay", **cycles),
        "plateau_mode": "min" if options.eval_metric == "loss" else "max",
        "step_on_epochs": not options.sched_on_updates,
        "updates_per_epoch": updates,
    }


def _trained(model: nn.Module, options: TrainOptions, lr: float) -> Any:
    """What the optimizer gets: the model, or groups by the transfer rules of munit scaling."""
    if options.mus_base_width is None:
        return model
    width = getattr(model, "embed_dim", None)  # a transformer has one; other networks go by the layer
    try:
        return revnets.mus_param_groups(model, lr, options.weight_decay, options.mus_base_width, width)
    except ValueError as error:
        raise UserError(f"--mus-base-width: {one_line(error)}.") from error


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
