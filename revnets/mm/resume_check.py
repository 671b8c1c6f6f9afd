"""Whether a checkpoint fits the runner that goes on from it, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..training.errors import one_line
from ..training.fitting import check_alike, check_buffers, check_optimizer, check_sparsity
from ..training.held import RUNNER, SCALER
from ..training.reading import CheckpointError, in_file, named
from ..training.schema import Array, Items, Number
from ..training.tree import Mismatch
from .sparsity_hook import SparsityHook


@HOOKS.register_module()
class ResumeCheckHook(Hook):
    """Refuses to resume from a checkpoint with odd entries, or of another optimizer, averages, schedules or masks.

    Example:
        >>> ResumeCheckHook().priority  # before the hooks that take their share of a checkpoint
        'VERY_HIGH'
    """

    priority = "VERY_HIGH"

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Look at what was read; the model and everything else still are as they were.

        Raises:
            CheckpointError: naming file and entry.
        """
        if not runner._resume:
            return
        file = runner._load_from
        with in_file(file, "--resume"):
            RUNNER.check(checkpoint)
            for path, optimizer, state in _optimizers(runner.optim_wrapper, checkpoint["optimizer"]):
                check_optimizer(optimizer, state, path)
                if "loss_scaler" in state:
                    SCALER.check(state["loss_scaler"], (*path, "loss_scaler"))
            for path, scheduler, state in _schedulers(runner.param_schedulers, checkpoint.get("param_schedulers")):
                _check_scheduler(scheduler, state, path)
            model = getattr(runner.model, "module", runner.model)
            for rank, own in enumerate(checkpoint.get("processes", [])):
                check_buffers(model, own.get("model", {}), ("processes", rank, "model"))
            for hook in runner.hooks:
                if hasattr(hook, "ema_model") and "ema_state_dict" in checkpoint:
                    _check_average(hook.ema_model, checkpoint["ema_state_dict"])
        _check_masks(runner, checkpoint, file)


def _optimizers(wrapper: Any, state: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any, Mapping[str, Any]]]:
    """Each optimizer of the runner, its state, and where that is."""
    if hasattr(wrapper, "optimizer"):
        yield ("optimizer",), wrapper.optimizer, state
        return
    for name, each in wrapper.items() if hasattr(wrapper, "items") else ():
        if name not in state:
            raise Mismatch(("optimizer", name), "is missing, the state of an optimizer was expected")
        yield ("optimizer", name), each.optimizer, state[name]


def _schedulers(own: Any, states: Any) -> Iterator[tuple[tuple[Any, ...], Any, Mapping[str, Any]]]:
    """Each schedule of the runner that has a state, the state, and where that is."""
    path: tuple[Any, ...] = ("param_schedulers",)
    if not own or states is None:
        return
    if isinstance(own, Mapping) != isinstance(states, Mapping):
        raise Mismatch(path, "are of several optimizers, or of one, other than the run's")
    pairs = [((*path, name), own[name], states.get(name, [])) for name in own] if isinstance(own, Mapping) else []
    for where, schedulers, entries in pairs or [(path, own, states)]:
        for index, (scheduler, entry) in enumerate(zip(schedulers, entries, strict=False)):  # as MMEngine does
            yield (*where, index), scheduler, entry


def _check_scheduler(scheduler: Any, state: Mapping[str, Any], path: tuple[Any, ...]) -> None:
    """MMEngine makes the entries attributes, whichever they are."""
    own = scheduler.state_dict()
    check_alike(state, own, path)
    for name in state:
        if name not in own and hasattr(scheduler, name):
            raise Mismatch((*path, name), f"would replace what a {type(scheduler).__name__} has of this name")
    groups = len(getattr(scheduler.optimizer, "param_groups", []))
    if groups and "_last_value" in state:
        Items(Number(), groups).check(state["_last_value"], (*path, "_last_value"))


def _check_average(average: Any, state: Mapping[str, Any]) -> None:
    own = {key.removeprefix("module."): value for key, value in average.state_dict().items()}
    theirs = {key.removeprefix("module."): value for key, value in state.items()}
    for name, value in own.items():
        if name in theirs and isinstance(value, torch.Tensor):
            Array(tuple(value.shape), finite="weights").check(theirs[name], ("ema_state_dict", name))


def _check_masks(runner: Any, checkpoint: Mapping[str, Any], file: str) -> None:
    hooks: Sequence[Any] = [hook for hook in runner.hooks if isinstance(hook, SparsityHook)]
    for controller in (hook.controller for hook in hooks if hook.controller is not None):
        if "sparsity" not in checkpoint:
            continue  # the hook says so
        try:
            with in_file(file, "--resume"):
                check_sparsity(controller, checkpoint["sparsity"], checkpoint["state_dict"])
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{named(file, '--resume')}: {one_line(error)}.") from error
