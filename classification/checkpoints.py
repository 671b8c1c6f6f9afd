"""Checkpoints that load with `weights_only=True`, are never half a file, and bring a run back as it was."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, get_state_dict, unwrap_model
from torch import nn

from revnets.training.errors import UserError, one_line
from revnets.training.files import whole_file
from classification.models import load_weights, read_checkpoint
from revnets.sparsity import SparsityController
from revnets.training.finite import FiniteGuard
from revnets.training.files import writing
from revnets.training.integrity import damage

_logger = logging.getLogger("classification")
PATTERN, LAST, RECOVERY = "*.pth.tar", "last.pth.tar", "recovery.pth.tar"
PATIENCE = ("num_bad_epochs", "cooldown_counter")  # of torch's ReduceLROnPlateau


class Saver(CheckpointSaver):
    """timm's saver of the last and the best epochs, writing plain values only.

    timm stores its options as an `argparse.Namespace`, which `torch.load(weights_only=True)` refuses. Here the file
    holds tensors, numbers, text, lists and dictionaries only, also the schedule and the list of the best epochs, and
    takes its name once it is complete.

    Args:
        model: Wrapped or not.
        optimizer: Its optimizer.
        args: The options, as plain values.
        scheduler: timm's, or None.
        model_ema: The running mean of the weights, or None.
        amp_scaler: The loss scaler, or None.
        sparsity: What changes the masks, or None.
        folder: Of the run.
        decreasing: Whether a lower metric is better.
        max_history: How many of the best epochs to keep.
        guard: Counts updates that were left out, or None.
    """

    checkpoint_files: list[tuple[str, Any]]  # and their metrics, the best first
    best_epoch: int | None
    best_metric: float | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        args: Mapping[str, Any],
        scheduler: Any,
        model_ema: ModelEmaV3 | None,
        amp_scaler: NativeScaler | None,
        sparsity: SparsityController | None,
        folder: Path,
        decreasing: bool,
        max_history: int,
        guard: FiniteGuard | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            args=dict(args),
            model_ema=model_ema,
            amp_scaler=amp_scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=decreasing,
            max_history=max_history,
        )
        self.scheduler = scheduler
        self.sparsity, self.guard = sparsity, guard
        self.extra: dict[str, float] = {}  # further numbers to store
        self.folder = folder

    def save_checkpoint(
        self, epoch: int, metric: float | None = None, processes: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[float | None, int | None]:
        """Saves after an epoch.

        Args:
            epoch: The finished one.
            metric: Ranks it; None: only the last.
            processes: What each of several has of its own.

        Returns:
            The best metric and its epoch.

        Raises:
            NotWritten: There is no space, say.
        """
        self._save(str(self.folder / LAST), epoch, metric, processes=processes)
        self.place(self.folder / LAST, epoch, metric)
        (self.folder / RECOVERY).unlink(missing_ok=True)
        return self.best_metric, self.best_epoch

    def save_position(self, position: Mapping[str, Any], processes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Saves in the middle of an epoch; there is only the latest such file.

        Args:
            position: Of which epoch how much is done, as plain values.
            processes: What each of several has of its own.

        Raises:
            NotWritten: There is no space, say.
        """
        self._save(str(self.folder / RECOVERY), position["epoch"] - 1, position=position, processes=processes)

    def place(self, path: Path, epoch: int, metric: float | None) -> None:
        """Gives a file of a finished epoch the other names that it deserves; a run that was killed in it can repeat it.

        Args:
            path: The file.
            epoch: The finished one.
            metric: Its rank among the best: as in timm, ties keep the earlier epoch, and epochs without one come last.
        """
        if metric is not None and not math.isfinite(metric):
            metric = None
        mine = (self._checkpoint_path(epoch), metric)
        files = [file for file in self.checkpoint_files if file[0] != mine[0]]
        ranked = [file for file in [*files, mine] if file[1] is not None]
        ranked.sort(key=lambda file: file[1] or 0.0, reverse=not self.decreasing)
        files = [*ranked, *(file for file in [mine, *files] if file[1] is None)]
        self.checkpoint_files = files[: self.max_history]
        if metric is not None and (self.best_metric is None or self.cmp(metric, self.best_metric)):
            self.best_epoch, self.best_metric = epoch, metric
        names = [LAST, *(["model_best.pth.tar"] if epoch == self.best_epoch else [])]
        names += [os.path.basename(mine[0])] if mine in self.checkpoint_files else []
        for name in names:
            self._duplicate(str(path), str(self.folder / name))
        for file, _ in files[self.max_history :]:
            Path(file).unlink(missing_ok=True)

    def _save(
        self,
        save_path: str,
        epoch: int,
        metric: float | None = None,
        position: Mapping[str, Any] | None = None,
        processes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        state: dict[str, Any] = {
            "epoch": epoch,
            "arch": self.args["model"],
            "version": 2,  # timm: `epoch` is the finished one
            "args": self.args,
            "metric": metric,
            **self.extra,
            "state_dict": get_state_dict(self.model, unwrap_model),
            "optimizer": self.optimizer.state_dict(),
            "history": {
                "files": [[os.path.basename(file), value] for file, value in self.checkpoint_files],
                "best_epoch": self.best_epoch,
                "best_metric": self.best_metric,
            },
        }
        if position is not None:
            state["position"] = dict(position)
        if processes:
            state["processes"] = list(processes)
        if self.scheduler is not None:
            state["scheduler"] = {**_plain(self.scheduler.state_dict()), **_patience(self.scheduler)}
        if self.model_ema is not None:
            state["state_dict_ema"] = get_state_dict(self.model_ema, unwrap_model)
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        if self.sparsity is not None:
            state["sparsity"] = self.sparsity.state_dict()
        if self.guard is not None:
            state["guard"] = self.guard.state_dict()
        failures = (OSError, RuntimeError)  # torch's writer has an error of its own
        with writing(save_path, failures), whole_file(Path(save_path)) as path, path.open("wb") as file:
            torch.save(state, file)

    def _duplicate(self, src: str, dst: str) -> None:
        if os.path.exists(dst) and os.path.samefile(src, dst):
            return
        temporary = Path(dst).with_name(f".tmp-{os.path.basename(dst)}")
        temporary.unlink(missing_ok=True)
        with writing(dst):
            try:
                os.link(src, temporary)
            except OSError:
                shutil.copy2(src, temporary)
            os.replace(temporary, dst)

    def restore_history(self, checkpoint: Mapping[str, Any], path: Path, newest: bool) -> None:
        """Takes the list of the best epochs from a checkpoint, without files that are gone.

        Args:
            checkpoint: As read.
            path: Of its file.
            newest: It is what the run of this folder did last: what a kill prevented afterwards is made up for.
        """
        history = checkpoint.get("history") or {}
        entries = [(os.path.join(self.checkpoint_dir, name), value) for name, value in history.get("files", [])]
        self.checkpoint_files = [entry for entry in entries if os.path.exists(entry[0])]
        self.best_epoch, self.best_metric = history.get("best_epoch"), history.get("best_metric")
        if checkpoint.get("position") is not None:
            return  # of after the epoch
        epoch, metric = checkpoint["epoch"], checkpoint.get("metric")
        if newest:
            self.place(path, epoch, metric)
            return
        metric = metric if metric is None or math.isfinite(metric) else None  # nothing would ever be better than NaN
        own = self._checkpoint_path(epoch)
        if metric is not None and os.path.exists(own) and own not in dict(self.checkpoint_files):
            self.checkpoint_files.append((own, metric))
            sign = 1 if self.decreasing else -1
            self.checkpoint_files.sort(key=lambda file: (file[1] is None, sign * (file[1] or 0.0)))
        if metric is not None and (self.best_metric is None or self.cmp(metric, self.best_metric)):
            self.best_epoch, self.best_metric = epoch, metric


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are plain values."""
    plain = (int, float, str, bool, type(None))
    simple = {key: list(value) if isinstance(value, tuple) else value for key, value in state.items()}
    return {
        key: value
        for key, value in simple.items()
        if isinstance(value, plain) or (isinstance(value, list) and all(isinstance(v, plain) for v in value))
    }


def _patience(scheduler: Any) -> dict[str, int]:
    """What timm's `plateau` leaves out of its state: epochs without a better metric, and epochs to wait."""
    inner = getattr(scheduler, "lr_scheduler", None)
    return {} if inner is None else {name: getattr(inner, name) for name in PATIENCE}


def by_age(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, the one that was written last first."""
    files = [file for file in folder.glob(PATTERN) if not file.name.startswith((".tmp-", "tmp"))]
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name == LAST), reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint to go on from: the newest that is whole and can be read; damaged ones are warned of.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    files = by_age(folder)
    return first_whole(files, folder, read_checkpoint) if files else None


def first_whole(files: Sequence[Path], folder: Path, read: Callable[[Path, str], Any]) -> Path:
    """The first of some checkpoints that is whole and can be read; those before it are warned of.

    Args:
        files: The newest first.
        folder: Theirs.
        read: Reads one for an option, or raises UserError: checksums do not cover the directory of the archive.

    Raises:
        UserError: All are damaged.
    """

    def unreadable(path: Path) -> str:
        try:
            read(path, "--resume")
        except UserError as error:
            return one_line(error.__cause__ or error).split(". ")[0][:160]
        return ""

    for file in files:
        problem = damage(file) or unreadable(file)
        if not problem:
            return file
        _logger.warning(f"--resume: '{file}' is damaged ({problem}); trying the one before it")
    raise UserError(f"--resume: all checkpoints in '{folder}' are damaged or gone; start anew with --overwrite.")


def remove_leftovers(folder: Path) -> None:
    """Removes files that a kill left half-written."""
    for file in folder.glob(".tmp-*"):
        file.unlink(missing_ok=True)


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
) -> dict[str, Any]:
    """Brings everything back to where a checkpoint was written.

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

    Returns:
        The checkpoint.

    Raises:
        UserError: Not readable, not of a training, or of another model.
    """
    checkpoint = read_checkpoint(path, "--resume")
    arch = checkpoint.get("arch", name)
    if "epoch" not in checkpoint or "optimizer" not in checkpoint:
        raise UserError(f"--resume: '{path}' holds weights only; start from them with --initial-checkpoint instead.")
    if arch != name:
        raise UserError(
            f"--resume: '{path}' is of model {arch}, not {name}; give --model {arch} or another checkpoint."
        )
    load_weights(model, checkpoint["state_dict"], f"--resume: '{path}'", name)
    if optimizer is not None:
        _load_optimizer(optimizer, checkpoint["optimizer"], path)
    if model_ema is not None:
        ema = checkpoint.get("state_dict_ema") or checkpoint["state_dict"]
        load_weights(model_ema.module, ema, f"--resume: '{path}' (EMA)", name)
    if amp_scaler is not None and amp_scaler.state_dict_key in checkpoint:
        amp_scaler.load_state_dict(checkpoint[amp_scaler.state_dict_key])
    if sparsity is not None:
        if "sparsity" not in checkpoint:
            raise UserError(
                f"--resume: '{path}' says nothing of the schedule of its masks; start from its weights with "
                "--initial-checkpoint instead."
            )
        try:
            sparsity.load_state_dict(checkpoint["sparsity"])
        except ValueError as error:
            raise UserError(f"--resume: '{path}': {one_line(error)}.") from error
    if scheduler is not None and "best" in checkpoint.get("scheduler", {}):
        scheduler.load_state_dict(checkpoint["scheduler"])
        for counter in PATIENCE:
            if counter in checkpoint["scheduler"]:  # not in older ones
                setattr(scheduler.lr_scheduler, counter, checkpoint["scheduler"][counter])
    if guard is not None:
        guard.load_state_dict(checkpoint.get("guard", {}))
    within = f" and {checkpoint['position']['step']} batches" if "position" in checkpoint else ""
    _logger.info(f"resumed from '{path}', {checkpoint['epoch'] + 1} epochs{within} done")
    return checkpoint


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path) -> None:
    groups = [(set(group), len(group["params"])) for group in state.get("param_groups", [])]
    own = [(set(group), len(group["params"])) for group in optimizer.state_dict()["param_groups"]]
    if groups != own:  # torch compares the sizes only, and another optimizer's state fails at the first step
        raise UserError(
            f"--resume: '{path}' is of another optimizer or other parameter groups; give its --opt, --weight-decay and "
            "--layer-decay, or --no-resume-opt."
        )
    optimizer.load_state_dict(dict(state))
