"""Going on from a checkpoint: everything that it must hold is checked before any of it is used."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn

from revnets.sparsity import SparsityController
from revnets.training.checkpoints.fitting import (
    apart,
    check_buffers,
    check_finite,
    check_optimizer,
    check_sparsity,
    differences,
)
from revnets.training.checkpoints.held import RUN
from revnets.training.checkpoints.reading import CheckpointError, check, in_file, named, read_checkpoint
from revnets.training.errors import UserError, one_line
from revnets.training.guards.finite import FiniteGuard

from .checkpoints import PATIENCE
from .models import fitting_weights
from .options import TrainOptions

_logger = logging.getLogger("classification")
SETTINGS = {  # of groups of parameters, and the options that set them; of others it is --opt-kwargs
    "weight_decay": ("weight_decay",),
    "betas": ("opt_betas",),
    "eps": ("opt_eps",),
    "momentum": ("momentum",),
    "lr_scale": ("layer_decay",),
    "lr": ("lr", "lr_base"),
    "initial_lr": ("lr", "lr_base"),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What somebody asks of the run that goes on: all options, and the names of those that were given."""

    options: TrainOptions
    given: Collection[str]

    def check(
        self, optimizer: torch.optim.Optimizer, scheduler: Any, state: Mapping[str, Any], path: str | Path
    ) -> None:
        """Refuses options of the optimizer that the state of a checkpoint would replace without a word.

        Raises:
            UserError: Naming both values.
        """
        options = self.options
        kept = ("lr",) if scheduler is None else ("initial_lr",) if hasattr(scheduler, "lr_scheduler") else ()
        found = differences(optimizer, state, (*kept, *options.opt_kwargs))
        for name, (theirs, own) in found.items():
            names = ("opt_kwargs",) if name in options.opt_kwargs else SETTINGS.get(name, ("opt_kwargs",))
            if name == "weight_decay" and options.mus_base_width is not None:
                names = (*names, "mus_base_width", "lr", "lr_base")  # its groups have a share of the rate
            flags = [f"--{each.replace('_', '-')}" for each in names if each in self.given]
            if flags:
                raise UserError(
                    f"--resume: '{path}' was trained with {name} {theirs}, and {' and '.join(flags)} would make it "
                    f"{own}; give what it was trained with, or --no-resume-opt, which starts the optimizer anew."
                )
            _logger.info(f"--resume: {name} stays {theirs}, as in '{path}'; it would be {own} by this run's options")


def read_run(path: str | Path, name: str, option: str = "--resume") -> dict[str, Any]:
    """A checkpoint that a run can go on from, all of whose entries are as they must be.

    Args:
        path: The file.
        name: Of the model.
        option: That named it, for messages.

    Raises:
        UserError: Not readable, not of a training, of another model, or with an entry that is odd.
    """
    checkpoint, what = read_checkpoint(path, option), named(path, option)
    if "epoch" not in checkpoint or "optimizer" not in checkpoint:
        raise UserError(f"{what} holds weights only; start from them with --initial-checkpoint instead.")
    arch = checkpoint.get("arch") or name
    if arch != name:
        raise UserError(f"{what} is of model {arch}, not {name}; give --model {arch} or another checkpoint.")
    check(checkpoint, RUN, path, option)
    return checkpoint


def check_steps(checkpoint: Mapping[str, Any], steps: int) -> None:
    """Refuses a checkpoint from the middle of an epoch that had another number of batches.

    Raises:
        UserError: It has.
    """
    position = checkpoint.get("position")
    if position is not None and position["steps"] != steps:
        raise UserError(
            f"--resume: the checkpoint is from the middle of an epoch of {position['steps']} batches, now there are "
            f"{steps}; give the same data, --batch-size and number of processes, or its last.pth.tar."
        )


def resume(
    path: Path,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    model_ema: ModelEmaV3 | None,
    amp_scaler: NativeScaler | None,
    sparsity: SparsityController | None,
    guard: FiniteGuard | None = None,
    steps: int | None = None,
    asked: Asked | None = None,
) -> dict[str, Any]:
    """Brings everything back to where a checkpoint was written; all of it is checked before any is used.

    Randomness is not in the file: it follows from the seed, the epoch, the batch or image, and the process. Schedules
    other than `plateau` follow from the epoch too, so more `--epochs` or another `--lr` take effect.

    Args:
        path: The checkpoint.
        name: Of the model.
        model: Not wrapped.
        optimizer: None leaves it as it is.
        scheduler: timm's, or None.
        model_ema: The running mean of the weights, or None.
        amp_scaler: The loss scaler, or None.
        sparsity: What changes the masks, or None.
        guard: Counts updates that were left out, or None.
        steps: Batches of an epoch; None: any.
        asked: Options, those of the optimizer to be as in the checkpoint; None: none were given.

    Returns:
        The checkpoint.

    Raises:
        UserError: Not readable, not of a training, of another model, or with an entry that is odd or does not fit;
            nothing has changed.
    """
    checkpoint, what = read_run(path, name), named(path, "--resume")
    if steps is not None:
        check_steps(checkpoint, steps)
    averaged = checkpoint.get("state_dict_ema") or checkpoint["state_dict"]
    weights = fitting_weights(model, checkpoint["state_dict"], what, name)
    ema = {} if model_ema is None else fitting_weights(model_ema.module, averaged, f"{what} (EMA)", name)
    with in_file(path, "--resume"):
        check_finite(model, weights, ("state_dict",))
        _check_processes(checkpoint.get("processes", []), model, model_ema)
        if optimizer is not None:
            _check_optimizer(optimizer, checkpoint["optimizer"], path)
            if asked is not None:
                asked.check(optimizer, scheduler, checkpoint["optimizer"], path)
        if model_ema is not None:
            check_finite(model_ema.module, ema, ("state_dict_ema",))
    if sparsity is not None:
        _check_sparsity(sparsity, checkpoint, weights, path)
    try:
        model.load_state_dict(weights)
        if optimizer is not None:
            optimizer.load_state_dict(apart(checkpoint["optimizer"]))
        if model_ema is not None:
            model_ema.module.load_state_dict(ema)
        if amp_scaler is not None and checkpoint.get(amp_scaler.state_dict_key):
            amp_scaler.load_state_dict(checkpoint[amp_scaler.state_dict_key])
        if sparsity is not None:
            sparsity.load_state_dict(checkpoint["sparsity"])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{what}: torch refuses it: {one_line(error)}; give another checkpoint.") from error
    if scheduler is not None and "best" in checkpoint.get("scheduler", {}):
        scheduler.load_state_dict(checkpoint["scheduler"])
        for counter in PATIENCE:
            if counter in checkpoint["scheduler"]:  # not in older ones
                setattr(scheduler.lr_scheduler, counter, checkpoint["scheduler"][counter])
    if guard is not None:
        guard.load_state_dict(checkpoint.get("guard", {}))
    within = f" and {checkpoint['position']['step']} batches" if checkpoint.get("position") is not None else ""
    _logger.info(f"resumed from '{path}', {checkpoint['epoch'] + 1} epochs{within} done")
    return checkpoint


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path) -> None:
    groups = [(set(group), len(group["params"])) for group in state["param_groups"]]
    own = [(set(group), len(group["params"])) for group in optimizer.state_dict()["param_groups"]]
    if groups != own:  # torch compares the sizes only, and another optimizer's state fails at the first step
        raise UserError(
            f"--resume: '{path}' is of another optimizer or other parameter groups; give its --opt, --weight-decay and "
            "--layer-decay, or --no-resume-opt."
        )
    check_optimizer(optimizer, state)


def _check_processes(processes: Sequence[Mapping[str, Any]], model: nn.Module, model_ema: ModelEmaV3 | None) -> None:
    modules = {"model": model, **({} if model_ema is None else {"ema": model_ema.module})}
    for rank, own in enumerate(processes):
        for name, module in modules.items():
            check_buffers(module, own["buffers"].get(name, {}), ("processes", rank, "buffers", name))


def _check_sparsity(
    sparsity: SparsityController, checkpoint: Mapping[str, Any], weights: Mapping[str, torch.Tensor], path: Path
) -> None:
    if "sparsity" not in checkpoint:
        raise UserError(
            f"--resume: '{path}' says nothing of the schedule of its masks; start from its weights with "
            "--initial-checkpoint instead."
        )
    try:
        with in_file(path, "--resume"):
            check_sparsity(sparsity, checkpoint["sparsity"], weights)
    except CheckpointError:
        raise
    except ValueError as error:
        raise UserError(f"--resume: '{path}': {one_line(error)}.") from error
