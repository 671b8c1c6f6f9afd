"""Going on from a checkpoint: everything that it must hold is checked before any of it is used."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

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
from revnets.training.options.parsing import options_of

from ..networks.models import fitting_weights
from ..options import TrainOptions
from .checkpoints import PATIENCE
from .state import State

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

    @classmethod
    def of(cls, options: TrainOptions, given: Collection[str] | None) -> Asked:
        """Where it is not known which were given, those that are not at their default."""
        known = options_of(TrainOptions).values()
        changed = [each.name for each in known if getattr(options, each.name) != each.default]
        return cls(options, changed if given is None else given)

    def check(self, run: State, state: Mapping[str, Any], path: str | Path) -> None:
        """Refuses options of the optimizer that the state of a checkpoint would replace without a word.

        Raises:
            UserError: Naming both values.
        """
        options = self.options
        kept = ("lr",) if run.scheduler is None else ("initial_lr",) if hasattr(run.scheduler, "lr_scheduler") else ()
        found = differences(run.optimizer, state, (*kept, *options.opt_kwargs))
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
    state: State,
    steps: int | None = None,
    *,
    optimizer: bool = True,
    asked: Asked | None = None,
) -> dict[str, Any]:
    """Brings everything back to where a checkpoint was written; all of it is checked before any is used.

    Randomness is not in the file: it follows from the seed, the epoch, the batch or image, and the process. Schedules
    other than `plateau` follow from the epoch too, so more `--epochs` or another `--lr` take effect.

    Args:
        path: The checkpoint.
        name: Of the model.
        state: Of the run, its model not wrapped.
        steps: Batches of an epoch; None: any.
        optimizer: Whether the optimizer goes on, too; else it stays as it is.
        asked: Options, those of the optimizer to be as in the checkpoint; None: none were given.

    Returns:
        The checkpoint.

    Raises:
        UserError: Not readable, not of a training, of another model, or with an entry that is odd or does not fit;
            nothing has changed.
    """
    checkpoint = read_run(path, name)
    if steps is not None:
        check_steps(checkpoint, steps)
    weights = _fitting_weights(path, name, state, checkpoint)
    if optimizer:
        with in_file(path, "--resume"):
            _check_optimizer(state.optimizer, checkpoint["optimizer"], path)
            if asked is not None:
                asked.check(state, checkpoint["optimizer"], path)
    if state.sparsity is not None:
        _check_sparsity(state.sparsity, checkpoint, weights["model"], path)
    try:
        _load(state, weights, checkpoint, optimizer)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = named(path, "--resume")
        raise CheckpointError(f"{what}: torch refuses it: {one_line(error)}; give another checkpoint.") from error
    _load_counters(state, checkpoint)
    within = f" and {checkpoint['position']['step']} batches" if checkpoint.get("position") is not None else ""
    _logger.info(f"resumed from '{path}', {checkpoint['epoch'] + 1} epochs{within} done")
    return checkpoint


def _fitting_weights(
    path: Path, name: str, state: State, checkpoint: Mapping[str, Any]
) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of each network, which fit it and are finite, as are the statistics of each process."""
    what, keys = named(path, "--resume"), {"model": "state_dict", "ema": "state_dict_ema"}
    found = {}
    for kind, network in state.networks.items():
        stored = checkpoint.get(keys[kind]) or checkpoint["state_dict"]
        found[kind] = fitting_weights(network, stored, what if kind == "model" else f"{what} (EMA)", name)
    with in_file(path, "--resume"):
        for kind, network in state.networks.items():
            check_finite(network, found[kind], (keys[kind],))
            for rank, own in enumerate(checkpoint.get("processes", [])):
                check_buffers(network, own["buffers"].get(kind, {}), ("processes", rank, "buffers", kind))
    return found


def _load(state: State, weights: Mapping[str, Any], checkpoint: Mapping[str, Any], optimizer: bool) -> None:
    """Puts what was checked into its place."""
    for kind, network in state.networks.items():
        network.load_state_dict(weights[kind])
    if optimizer:
        state.optimizer.load_state_dict(apart(checkpoint["optimizer"]))
    if state.scaler is not None and checkpoint.get(state.scaler.state_dict_key):
        state.scaler.load_state_dict(checkpoint[state.scaler.state_dict_key])
    if state.sparsity is not None:
        state.sparsity.load_state_dict(checkpoint["sparsity"])


def _load_counters(state: State, checkpoint: Mapping[str, Any]) -> None:
    """What a `plateau` schedule and the guard have counted."""
    if state.scheduler is not None and "best" in checkpoint.get("scheduler", {}):
        state.scheduler.load_state_dict(checkpoint["scheduler"])
        for counter in PATIENCE:
            if counter in checkpoint["scheduler"]:  # not in older ones
                setattr(state.scheduler.lr_scheduler, counter, checkpoint["scheduler"][counter])
    if state.guard is not None:
        state.guard.load_state_dict(checkpoint.get("guard", {}))


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path) -> None:
    groups = [(set(group), len(group["params"])) for group in state["param_groups"]]
    own = [(set(group), len(group["params"])) for group in optimizer.state_dict()["param_groups"]]
    if groups != own:  # torch compares the sizes only, and another optimizer's state fails at the first step
        raise UserError(
            f"--resume: '{path}' is of another optimizer or other parameter groups; give its --opt, --weight-decay and "
            "--layer-decay, or --no-resume-opt."
        )
    check_optimizer(optimizer, state)


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
