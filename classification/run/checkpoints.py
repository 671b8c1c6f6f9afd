"""Checkpoints that load with `weights_only=True`, are never half a file, and bring a run back as it was."""

from __future__ import annotations

import math
import operator
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from revnets.training.checkpoints.fitting import complete
from revnets.training.checkpoints.integrity import first_whole
from revnets.training.checkpoints.reading import read_file
from revnets.training.files import TEMPORARY, duplicate, whole_file, writing

from .state import State

PATTERN, LAST, BEST, RECOVERY = "*.pth.tar", "last.pth.tar", "model_best.pth.tar", "recovery.pth.tar"
_OF_EPOCH = re.compile(r"checkpoint-\d{1,9}\.pth\.tar")
PATIENCE = ("num_bad_epochs", "cooldown_counter")  # of torch's ReduceLROnPlateau


class Saver:
    """Saves the last and the best epochs, under the names and in the ranks of timm's, as plain values only.

    timm stores its options as an `argparse.Namespace`, which `torch.load(weights_only=True)` refuses. Here the file
    holds tensors, numbers, text, lists and dictionaries only, also the schedule and the list of the best epochs, and
    takes its name once it is complete.

    Args:
        state: Of the run.
        args: The options, as plain values.
        folder: Of the run.
        decreasing: Whether a lower metric is better.
        max_history: How many of the best epochs to keep.
    """

    def __init__(
        self, state: State, args: Mapping[str, Any], folder: Path, *, decreasing: bool, max_history: int
    ) -> None:
        self.state, self.args, self.folder = state, dict(args), folder
        self.decreasing, self.max_history = decreasing, max_history
        self.checkpoint_files: list[tuple[str, Any]] = []  # and their metrics, the best first
        self.best_epoch: int | None = None
        self.best_metric: float | None = None
        self.extra: dict[str, float] = {}  # further numbers to store

    def save_checkpoint(
        self, epoch: int, metric: float | None = None, processes: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Saves after an epoch.

        Args:
            epoch: The finished one.
            metric: Ranks it; None: only the last.
            processes: What each of several has of its own.

        Raises:
            NotWritten: There is no space, say.
        """
        self._save(self.folder / LAST, epoch, metric, processes=processes)
        self.place(self.folder / LAST, epoch, metric)
        _remove(self.folder / RECOVERY)

    def save_position(self, position: Mapping[str, Any], processes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Saves in the middle of an epoch; there is only the latest such file.

        Args:
            position: Of which epoch how much is done, as plain values.
            processes: What each of several has of its own.

        Raises:
            NotWritten: There is no space, say.
        """
        self._save(self.folder / RECOVERY, position["epoch"] - 1, position=position, processes=processes)

    def place(self, path: Path, epoch: int, metric: float | None) -> None:
        """Gives a file of a finished epoch the other names that it deserves; a run that was killed in it can repeat it.

        Args:
            path: The file.
            epoch: The finished one.
            metric: Its rank among the best: as in timm, ties keep the earlier epoch, and epochs without one come last.
        """
        if metric is not None and not math.isfinite(metric):
            metric = None
        mine = (self._of_epoch(epoch), metric)
        files = [file for file in self.checkpoint_files if file[0] != mine[0]]
        ranked = [file for file in [*files, mine] if file[1] is not None]
        ranked.sort(key=lambda file: file[1] or 0.0, reverse=not self.decreasing)
        files = [*ranked, *(file for file in [mine, *files] if file[1] is None)]
        self.checkpoint_files = files[: self.max_history]
        self._rank(epoch, metric)
        names = [LAST, *([BEST] if epoch == self.best_epoch else [])]
        names += [os.path.basename(mine[0])] if mine in self.checkpoint_files else []
        for name in names:
            duplicate(path, self.folder / name)
        for file, _ in files[self.max_history :]:
            _remove(Path(file))

    def _of_epoch(self, epoch: int) -> str:
        return str(self.folder / f"checkpoint-{epoch}.pth.tar")

    def _rank(self, epoch: int, metric: float | None) -> None:
        """Takes the epoch for the best one where it is."""
        better = operator.lt if self.decreasing else operator.gt
        if metric is not None and (self.best_metric is None or better(metric, self.best_metric)):
            self.best_epoch, self.best_metric = epoch, metric

    def _save(
        self,
        path: Path,
        epoch: int,
        metric: float | None = None,
        position: Mapping[str, Any] | None = None,
        processes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        run = self.state
        content: dict[str, Any] = {
            "epoch": epoch,
            "arch": self.args["model"],
            "version": 2,  # timm: `epoch` is the finished one
            "args": self.args,
            "metric": metric,
            **self.extra,
            "state_dict": run.plain.state_dict(),
            "optimizer": complete(run.optimizer.state_dict()),
            "history": {
                "files": [[os.path.basename(file), value] for file, value in self.checkpoint_files],
                "best_epoch": self.best_epoch,
                "best_metric": self.best_metric,
            },
        }
        if position is not None:
            content["position"] = dict(position)
        if processes:
            content["processes"] = list(processes)
        if run.scheduler is not None:
            content["scheduler"] = {**_plain(run.scheduler.state_dict()), **_patience(run.scheduler)}
        if run.ema is not None:
            content["state_dict_ema"] = run.ema.module.state_dict()
        if run.scaler is not None:
            content[run.scaler.state_dict_key] = run.scaler.state_dict()
        if run.sparsity is not None:
            content["sparsity"] = run.sparsity.state_dict()
        if run.guard is not None:
            content["guard"] = run.guard.state_dict()
        failures = (OSError, RuntimeError)  # torch's writer has an error of its own
        with writing(path, failures), whole_file(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    def restore_history(self, checkpoint: Mapping[str, Any], path: Path, newest: bool) -> None:
        """Takes the list of the best epochs from a checkpoint, without files that are gone.

        Later epochs have the worst of them removed, so it names files of this folder only, and as a run names them.

        Args:
            checkpoint: As read.
            path: Of its file; of what lies elsewhere, the list is of other files than this folder's.
            newest: It is what the run of this folder did last: what a kill prevented afterwards is made up for.
        """
        history = checkpoint.get("history")
        history = history if isinstance(history, Mapping) else {}
        here = os.path.realpath(path.parent) == os.path.realpath(self.folder)
        ranked = _ranked(history.get("files")) if here else {}
        entries = [(str(self.folder / name), metric) for name, metric in ranked.items()]
        self.checkpoint_files = [entry for entry in entries if _is_file(Path(entry[0]))]
        self.best_epoch, self.best_metric = history.get("best_epoch"), _number(history.get("best_metric"))
        if checkpoint.get("position") is not None:
            return  # of after the epoch
        epoch, metric = checkpoint["epoch"], checkpoint.get("metric")
        metric = metric if metric is not None and math.isfinite(metric) else None  # nothing would be better than NaN
        if newest:
            self.place(path, epoch, metric)
            return
        own = self._of_epoch(epoch)
        if metric is not None and os.path.exists(own) and own not in dict(self.checkpoint_files):
            self.checkpoint_files.append((own, metric))
            sign = 1 if self.decreasing else -1
            self.checkpoint_files.sort(key=lambda file: (file[1] is None, sign * (file[1] or 0.0)))
        self._rank(epoch, metric)


def _ranked(files: Any) -> dict[str, float | None]:
    """Names of checkpoints and their metrics out of a file that anybody may have made; what else is there is left."""
    files = files if isinstance(files, (list, tuple)) else ()
    pairs = (each for each in files if isinstance(each, (list, tuple)) and len(each) == 2)
    return {name: _number(metric) for name, metric in pairs if isinstance(name, str) and _OF_EPOCH.fullmatch(name)}


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _is_file(path: Path) -> bool:
    """Whether there is a file of that name, not a link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _remove(path: Path) -> None:
    if _is_file(path):
        with writing(path):
            path.unlink(missing_ok=True)


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


def is_checkpoint(name: str) -> bool:
    """Whether a run gives its checkpoints such names.

    Args:
        name: Of a file, without its folder.
    """
    return name in (LAST, BEST, RECOVERY) or _OF_EPOCH.fullmatch(name) is not None


def by_age(folder: Path, own: bool = False) -> list[Path]:
    """The checkpoints in a folder, the one that was written last first.

    Args:
        folder: Of a run.
        own: Only those that a run itself has written, by their names.
    """
    files = {}
    for file in folder.glob(PATTERN):
        wanted = is_checkpoint(file.name) if own else not file.name.startswith((TEMPORARY, "tmp"))
        if wanted and file.is_file():
            files[file] = (file.stat().st_mtime_ns, file.name == LAST)
    return sorted(files, key=lambda file: files[file], reverse=True)


def newest_whole(folder: Path, own: bool = False) -> Path | None:
    """The checkpoint to go on from: the newest that is whole and can be read; damaged ones are warned of.

    Args:
        folder: Of a run.
        own: Only those that a run itself has written, by their names.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    files = by_age(folder, own)
    return first_whole(files, folder, read_file) if files else None
