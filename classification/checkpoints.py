"""Checkpoints that load with `weights_only=True`, are never half a file, and bring a run back as it was."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, get_state_dict, unwrap_model
from torch import nn

from classification.errors import UserError, one_line, whole_file
from classification.models import load_weights, read_checkpoint
from revnets.sparsity import SparsityController

_logger = logging.getLogger("classification")
PATTERN = "*.pth.tar"


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
    """

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
        self.sparsity = sparsity
        self.extra: dict[str, float] = {}  # further numbers to store

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
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
        if self.scheduler is not None:
            state["scheduler"] = _plain(self.scheduler.state_dict())
        if self.model_ema is not None:
            state["state_dict_ema"] = get_state_dict(self.model_ema, unwrap_model)
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        if self.sparsity is not None:
            state["sparsity"] = self.sparsity.state_dict()
        try:
            with whole_file(Path(save_path)) as path:
                torch.save(state, path)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--output: '{save_path}' cannot be written ({one_line(error)}); free space there."
            ) from error

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)  # timm removes the old file first, and a kill in between would leave none

    def _duplicate(self, src: str, dst: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(dst)
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)

    def restore_history(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the list of the best epochs from a checkpoint of the same folder, without files that are gone."""
        history = checkpoint.get("history") or {}
        entries = [(name, value) for name, value in history.get("files", [])]
        epoch, metric = checkpoint.get("epoch"), checkpoint.get("metric")
        entries.append((f"{self.save_prefix}-{epoch}{self.extension}", metric))
        paths = [(os.path.join(self.checkpoint_dir, name), value) for name, value in entries if value is not None]
        kept = {path: (path, value) for path, value in paths if os.path.exists(path)}
        self.checkpoint_files = sorted(kept.values(), key=lambda c: c[1], reverse=not self.decreasing)
        self.best_epoch, self.best_metric = history.get("best_epoch"), history.get("best_metric")
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


def newest(folder: Path) -> Path | None:
    """The checkpoint of a run's folder that was written last, or None."""
    files = [file for file in folder.glob(PATTERN) if not file.name.startswith((".tmp-", "tmp"))]
    return max(files, key=lambda file: (file.stat().st_mtime_ns, file.name == "last.pth.tar"), default=None)


def resume(
    path: Path,
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    model_ema: ModelEmaV3 | None,
    amp_scaler: NativeScaler | None,
    sparsity: SparsityController | None,
) -> dict[str, Any]:
    """Brings everything back to the end of the epoch that a checkpoint was written after.

    Randomness is not in the file: each epoch's follows from the seed, the epoch and the process. Schedules other than
    `plateau` follow from the epoch too, so more `--epochs` or another `--lr` take effect.

    Args:
        path: The checkpoint.
        name: Of the model.
        model: Not wrapped.
        optimizer: None leaves it as it is.
        scheduler: timm's, or None.
        model_ema: The running mean of the weights, or None.
        amp_scaler: The loss scaler, or None.
        sparsity: What changes the masks, or None.

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
    _logger.info(f"resumed from '{path}', {checkpoint['epoch'] + 1} epochs done")
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
