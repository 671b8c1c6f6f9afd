"""Whether a checkpoint fits the runner that goes on from it, before anything of it is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS

from ...training.checkpoints.fitting import check_alike, check_buffers, check_optimizer, check_sparsity, differences
from ...training.checkpoints.held import RUNNER, SCALER
from ...training.checkpoints.reading import CheckpointError, in_file, named
from ...training.checkpoints.schema import Array, Items, Number, Record, expected, optional
from ...training.checkpoints.tree import Mismatch
from ...training.errors import one_line
from .checkpoint import modules_of
from .resume import BATCHES, ResumableTrainLoop
from .sparsity import SparsityHook

_HISTORY = ("max_length", "_log_history", "_count_history")  # of MMEngine's HistoryBuffer
_BASE = optional(Record({"lr": Number(0)}, {"momentum": Number(0, 1), "betas": Items(Number(0, 1), 2)}))


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
                _BASE.check(state.get("base_param_settings"), (*path, "base_param_settings"))
                if "loss_scaler" in state:
                    SCALER.check(state["loss_scaler"], (*path, "loss_scaler"))
            for path, scheduler, state in _schedulers(runner.param_schedulers, checkpoint.get("param_schedulers")):
                _check_scheduler(scheduler, state, path)
            for name, module in modules_of(runner).items():
                for rank, own in enumerate(checkpoint.get("processes", [])):
                    check_buffers(module, own.get(name, {}), ("processes", rank, name))
            for hook in runner.hooks:
                if hasattr(hook, "ema_model"):  # EMAHook exchanges the two, so that both have to fit it
                    for name in ("state_dict", "ema_state_dict"):
                        _check_average(hook.ema_model, checkpoint.get(name, {}), name)
                    for key in checkpoint.get("ema_state_dict", {}):
                        if key.startswith("module.") and key.removeprefix("module.") not in checkpoint["state_dict"]:
                            raise Mismatch(("state_dict", key.removeprefix("module.")), "is missing beside its average")
            _check_histories(checkpoint["message_hub"]["log_scalars"])
        with _of_file(file):
            for _, optimizer, state in _optimizers(runner.optim_wrapper, checkpoint["optimizer"]):
                _check_settings(optimizer, runner.param_schedulers, state)
            if isinstance(runner.train_loop, ResumableTrainLoop):
                meta, before = checkpoint["meta"], checkpoint["message_hub"]["runtime_info"].get(BATCHES)
                runner.train_loop.batches_done_at(meta["iter"], meta["epoch"], before)
            for hook in runner.hooks:
                if isinstance(hook, SparsityHook) and hook.controller is not None and "sparsity" in checkpoint:
                    check_sparsity(hook.controller, checkpoint["sparsity"], checkpoint["state_dict"])


def _optimizers(wrapper: Any, state: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any, Mapping[str, Any]]]:
    """Each optimizer of the runner, its state, and where that is."""
    if hasattr(wrapper, "optimizer"):
        yield ("optimizer",), wrapper.optimizer, state
        return
    for name, each in wrapper.items() if hasattr(wrapper, "items") else ():
        if name not in state:
            raise Mismatch(("optimizer", name), "is missing, the state of an optimizer was expected")
        yield ("optimizer", name), each.optimizer, state[name]


def _check_settings(optimizer: torch.optim.Optimizer, schedulers: Any, state: Mapping[str, Any]) -> None:
    """The configuration's settings are those of the state, which would replace them without a word."""
    lists = schedulers.values() if isinstance(schedulers, Mapping) else [schedulers or []]
    changed = {each.param_name for each in itertools.chain(*lists)}  # by schedules: rates, momentum
    for name, (theirs, own) in differences(optimizer, state, ("initial_lr" if "lr" in changed else "lr",)).items():
        if name not in changed:
            raise ValueError(
                f"it was trained with {name.removeprefix('initial_')} {theirs}, and optim_wrapper of the configuration "
                f"makes it {own}; set what it was trained with, or give it as load_from, which takes its weights alone"
            )


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
        if isinstance(own.get(name), str) and state[name] != own[name]:  # which of the optimizer's numbers it changes
            raise expected((*path, name), state[name], f"'{own[name]}', as in this run,")
        if name not in own and hasattr(scheduler, name):
            raise Mismatch((*path, name), f"would replace what a {type(scheduler).__name__} has of this name")
    groups = len(getattr(scheduler.optimizer, "param_groups", []))
    if groups and "_last_value" in state:
        Items(Number(), groups).check(state["_last_value"], (*path, "_last_value"))


def _check_average(average: Any, state: Mapping[str, Any], path: str) -> None:
    own = {key.removeprefix("module."): value for key, value in average.state_dict().items()}
    theirs = {key.removeprefix("module."): value for key, value in state.items()}
    for name, value in own.items():
        if name in theirs and isinstance(value, torch.Tensor):
            Array(tuple(value.shape), finite="weights").check(theirs[name], (path, name))


def _check_histories(histories: Mapping[str, Any]) -> None:
    """MMEngine adds to them and smooths them."""
    for name, history in histories.items():
        if isinstance(history, HistoryBuffer):
            longest, *parts = (vars(history).get(part) for part in _HISTORY)
            numbers = [part for part in parts if isinstance(part, np.ndarray) and part.dtype.kind in "iuf"]
            shapes = {part.shape for part in numbers}
            right = len(numbers) == 2 and len(shapes) == 1 and numbers[0].ndim == 1
            if not right or type(longest) is not int or longest < 1 or set(vars(history)) != set(_HISTORY):
                raise Mismatch(("message_hub", "log_scalars", name), "is no history of numbers, one was expected")


@contextmanager
def _of_file(file: str) -> Iterator[None]:
    """Inside, what does not fit the run is said with the file."""
    try:
        with in_file(file, "--resume"):
            yield
    except ValueError as error:
        text = one_line(error)
        raise CheckpointError(text if text.startswith("--resume") else f"{named(file, '--resume')}: {text}.") from error
