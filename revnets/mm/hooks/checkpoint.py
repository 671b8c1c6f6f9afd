"""Checkpoints that are written whole or not at all, and never removed before their successor is there."""

import atexit
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from torch import nn

from ...training.checkpoints.fitting import complete
from ...training.files import leftovers, named_file, write, writing
from ...training.lock import FolderLock, held_here
from ...training.processes import at_first, of_first, own_buffers, put_buffers

BACKEND = "revnets.whole_files"
INTERIM, LAST = "interim.pth", "last_checkpoint"
_SAVED = re.compile(r"[^/\\]+\.pth")
_locks: list[FolderLock] = []  # that hooks have taken


def own_names(known: dict[str, Any], folder: Path) -> None:
    """Has what a checkpoint says of other checkpoints mean files of this folder only: the hook removes such files.

    Args:
        known: Of MMEngine's message hub, after a run was resumed; it is changed.
        folder: Of the run's checkpoints.
    """
    for key in [key for key in known if key in ("best_ckpt", "last_ckpt") or key.startswith("best_ckpt_")]:
        path = named_file(folder, known[key])
        if path is None:
            del known[key]
        else:
            known[key] = str(path)
    steps = known.pop("keep_ckpt_ids", None)
    if isinstance(steps, (list, tuple)) and all(type(step) is int and step >= 0 for step in steps):
        known["keep_ckpt_ids"] = list(steps)


def hold_folder(hook: CheckpointHook, runner: Any) -> None:
    """Before a training, have the first process take the work folder, unless it has it.

    Raises:
        InUse: another run is in it; in all processes.
    """

    def take() -> None:
        hook.folder_lock = held_here(Path(runner.work_dir))
        if hook.folder_lock is None:
            hook.folder_lock = FolderLock(Path(runner.work_dir), "give another work_dir")
            _locks.append(hook.folder_lock)

    if isinstance(runner._train_loop, BaseLoop):  # it is built when a training begins
        of_first(take)


def give_folder_back(hook: CheckpointHook, runner: Any) -> None:
    """After a run, release what a hook has taken, this one or that of a run which failed in this process."""
    lock = vars(hook).get("folder_lock")
    if lock in _locks:
        _locks.remove(lock)
        lock.release()


@atexit.register
def _release_all() -> None:
    for lock in _locks:
        lock.release()


def protect() -> None:
    """Have MMEngine's own ``CheckpointHook`` hold its folder and take names for names, in scripts that use it."""
    plain = CheckpointHook.before_train

    @functools.wraps(plain)
    def before_train(self: CheckpointHook, runner: Any) -> None:
        own_names(runner.message_hub.runtime_info, checkpoint_folder(self, runner))
        plain(self, runner)

    CheckpointHook.before_train = before_train
    CheckpointHook.before_run, CheckpointHook.after_run = hold_folder, give_folder_back


def checkpoint_folder(hook: CheckpointHook, runner: Any) -> Path:
    """Where a hook will save, as it finds it itself before a training."""
    if hook.out_dir is None or hook.out_dir == runner.work_dir:
        return Path(runner.work_dir)
    return Path(hook.out_dir, os.path.basename(str(runner.work_dir).rstrip(os.sep)))


class WholeFilesBackend(LocalBackend):
    """MMEngine's local files, each written to a temporary one first; removals can be put off."""

    name = BACKEND
    _put_off: list[str] | None = None

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file, which appears complete or not at all.

        Raises:
            NotWritten: there is no space, say.
        """
        path = Path(filepath)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, lambda temporary: _write_through(temporary, obj))

    def remove(self, filepath: str | Path) -> None:
        """Remove a file, at once or later."""
        if self._put_off is None:
            super().remove(filepath)
        else:
            self._put_off.append(str(filepath))

    @contextmanager
    def removals_put_off(self) -> Iterator[list[str]]:
        """Inside, removals only add to a list, which is given."""
        self._put_off = []
        try:
            yield self._put_off
        finally:
            self._put_off = None


register_backend(BACKEND, WholeFilesBackend, force=True)


class UnknownMetric(ValueError):
    """The best checkpoint is to be chosen by a metric that no evaluator gives."""


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook`` for local folders, safe against being killed at any moment.

    Files appear complete or not at all; ``last_checkpoint`` names a complete one; old ones (``max_keep_ckpts``, a best
    one that was surpassed) go after the new one is there. In a ``ResumableTrainLoop`` it also saves after SIGTERM and
    before a validation, which takes long and changes nothing.

    Args:
        interim: also save every so many iterations, to ``interim.pth``, of which there is only the latest; 0: never.
        **options: of ``CheckpointHook``.

    Example:
        >>> WholeCheckpointHook(interval=1, save_best="coco/bbox_mAP", interim=1000).interim
        1000
    """

    def __init__(self, interim: int = 0, **options: Any) -> None:
        super().__init__(**{"backend_args": {"backend": BACKEND}, **options})
        self.interim = interim
        self._due, self._saved_at = False, -1
        self._processes: list[Any] = []  # while a file is saved
        self.folder_lock: FolderLock | None = None

    def before_run(self, runner: Any) -> None:
        """Take the run's folder, see ``hold_folder``."""
        hold_folder(self, runner)

    def after_run(self, runner: Any) -> None:
        """Give the folder back."""
        give_folder_back(self, runner)

    def before_train(self, runner: Any) -> None:
        """Find the folder; remove what a kill left half-written in it."""
        folder = checkpoint_folder(self, runner)
        own_names(runner.message_hub.runtime_info, folder)
        super().before_train(runner)
        if self.folder_lock is not None and self.folder_lock.known:  # in the first process
            for file in leftovers(folder, lambda name: name == LAST or _SAVED.fullmatch(name)):
                file.unlink(missing_ok=True)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save, if it is time; between two updates of the weights, as accumulated gradients are in no file."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if self.interim > 0 and self.by_epoch:
            self._due |= self.every_n_train_iters(runner, self.interim)
            if self._due and runner.optim_wrapper.should_update():
                self._save(runner, INTERIM, {"epoch": runner.epoch, "iter": runner.iter + 1})

    def before_train_validation(self, runner: Any) -> None:
        """Save, unless that was done at the end of the epoch, so that the validation can be interrupted."""
        if self.interim > 0 and self._saved_at != runner.iter:
            self._save(runner, INTERIM, {"epoch": runner.epoch, "iter": runner.iter})

    def before_termination(self, runner: Any) -> None:
        """Save what is not saved yet."""
        if self._saved_at != runner.iter:
            self._save(runner, INTERIM, {"epoch": runner.epoch, "iter": runner.iter})

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """End a validation in training after SIGTERM; it is made up for."""
        end = getattr(runner._train_loop, "end_validation_if_terminated", None)
        if end is not None and self._saved_at == runner.iter:
            end()

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        """Save, name the file in ``last_checkpoint``, and remove what is one too many."""
        outdated = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated.append(self.keep_ckpt_ids.popleft())
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self._save(runner, self.filename_tmpl.format(step), meta)
        if is_main_process():
            for old in outdated:
                Path(self.out_dir, self.filename_tmpl.format(old)).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        if not metrics:  # COCO's, where nothing was found
            return
        unknown = [key for key in self.key_indicators if key not in metrics and key != "auto"] if self.save_best else []
        if unknown:
            raise UnknownMetric(
                f"save_best={unknown[0]!r} is none of the validation's metrics: expected one of {', '.join(metrics)}; "
                "correct default_hooks.checkpoint.save_best and go on with --resume"
            )
        with self.file_backend.removals_put_off() as surpassed:
            super()._save_best_checkpoint(runner, metrics)
        now = vars(self)
        best = {now.get("best_ckpt_path"), *now.get("best_ckpt_path_dict", {}).values()}
        for path in surpassed:
            if path not in best:  # a repeated epoch writes the same file again
                Path(path).unlink(missing_ok=True)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put in what each of several processes has of its own, and which parameters the optimizers have nothing of."""
        state = checkpoint.get("optimizer")
        if state is not None:
            several = {name: complete(each) for name, each in state.items()} if "state" not in state else {}
            checkpoint["optimizer"] = several or complete(state)
        if self._processes:
            checkpoint["processes"] = self._processes

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Give it back, if there are as many processes again; comes after ``EMAHook``, and before the model loads."""
        everyone = checkpoint.pop("processes", [])
        if not runner._resume or len(everyone) != runner.world_size:
            if runner._resume and (runner.world_size > 1 or everyone):
                runner.logger.warning(
                    f"the checkpoint is of {len(everyone) or 1} processes, now there are {runner.world_size}: running "
                    "statistics are the first one's"
                )
            return
        own = everyone[runner.rank]
        checkpoint["state_dict"].update(own["model"])
        for name, module in modules_of(runner).items():
            put_buffers(module, own.get(name, {}))

    def _save(self, runner: Any, name: str, meta: dict[str, Any]) -> None:
        self._due, self._saved_at = False, meta.get("iter", runner.iter)
        self.last_ckpt = os.path.join(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        self._processes = at_first({name: own_buffers(module) for name, module in modules_of(runner).items()})
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._processes = []
        if is_main_process():
            text = self.last_ckpt
            write(Path(runner.work_dir, LAST), lambda path: path.write_text(text, encoding="utf-8"))


def modules_of(runner: Any) -> dict[str, nn.Module]:
    """What has running statistics: the model and, where ``EMAHook`` keeps one, its mean."""
    found = {"model": getattr(runner.model, "module", runner.model)}
    means = [hook.ema_model.module for hook in runner.hooks if hasattr(hook, "ema_model")]
    return {**found, **({"ema": means[0]} if means else {})}


def _write_through(path: Path, content: bytes) -> None:
    path.write_bytes(content)  # `write` sees to it that the disk has it
