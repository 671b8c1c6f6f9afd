"""The folder of a run: where the run goes on from, and what its first process writes there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from revnets.numerics import NumericsMonitor
from revnets.pruning.checkpoint import FLOPS
from revnets.training.mask_report import write_table
from revnets.training.pictures import caption
from revnets.training.processes import of_first, settle_buckets

from ..images.data import Splits
from ..networks.network import Network
from ..networks.sparse import RunFlops, draw_sparsity, sparsity_words
from ..options import TrainOptions, as_dict
from ..runtime import Runtime
from .checkpoints import BEST, LAST, Saver
from .folder import RunFolder
from .recovery import OwnState, Position
from .report import Row, Summary, draw_curves, write_args
from .resuming import Asked, resume
from .training import Training

_logger = logging.getLogger("classification")


class Journal:
    """The folder of a run, taken and held; and the run, brought back where it is resumed.

    Args:
        run: As it would begin.
        network: Of it.
        splits: Of its images.
        asked: Of it, where it goes on.
        held: Gives the folder back in the end.

    Raises:
        UserError: Another run has the folder, or there is one in it; or the checkpoint cannot be gone on from.
    """

    def __init__(
        self, run: Training, network: Network, splits: Splits, asked: Asked, held: contextlib.ExitStack
    ) -> None:
        self.run = run
        mine: list[RunFolder] = []  # of the first process alone; what keeps it from it, all learn of

        def take() -> tuple[Path, Path | None]:
            mine.append(RunFolder(run.options, network.config["input_size"][-1]))
            held.callback(mine[0].close)
            return mine[0].path, mine[0].checkpoint

        self.folder, path = of_first(take)
        checkpoint, self.begin = _brought_back(run, path, asked)
        of_first(lambda: mine[0].clear())
        self._spread(network.model, checkpoint)
        self.saver: Saver | None = None  # of the process that writes
        if run.runtime.primary:
            self._open(path, checkpoint)
            self._announce(network.model, splits)
        self.summary = Summary(self.folder, self.begin.epoch)
        images = run.options.batch_size * run.runtime.world_size * len(run.data.loader) / run.updates_per_epoch
        self.flops = RunFlops(network.model, network.config["input_size"], run.sparsity, images, network.flops_before)

    def _spread(self, model: nn.Module, checkpoint: Mapping[str, Any] | None) -> None:
        """Wraps the model for several processes, each of which then gets back what it had of its own."""
        run = self.run
        if run.runtime.distributed:
            run.model = _distributed(model, run.runtime, run.options)
            if run.task is not None:
                run.task.trainable_module = run.model
        run.recovery.own = OwnState(run.runtime, run.networks)
        if checkpoint is not None:
            self.begin = run.recovery.own.restore(checkpoint, self.begin)

    def _open(self, path: Path | None, checkpoint: Mapping[str, Any] | None) -> None:
        """Gets ready to write."""
        run, options, folder = self.run, self.run.options, self.folder
        values, lower = as_dict(options), options.eval_metric == "loss"
        write_args(folder, values)
        self.saver = Saver(run, values, folder, decreasing=lower, max_history=options.checkpoint_hist)
        if checkpoint is not None and path is not None:
            in_place = path.parent.resolve() == folder.resolve()
            self.saver.restore_history(checkpoint, path, in_place and (options.resume == "auto" or path.name == LAST))
        run.recovery.saver = self.saver
        if options.numerics_interval:
            run.numerics = NumericsMonitor(run.plain, options.numerics_interval)
            run.numerics.resume(folder, run.updates_before(self.begin))

    def _announce(self, model: nn.Module, splits: Splits) -> None:
        run, options, runtime = self.run, self.run.options, self.run.runtime
        parameters = sum(p.numel() for p in model.parameters())
        precision = str(runtime.amp_dtype).removeprefix("torch.") if runtime.amp_dtype else "float32"
        _logger.info(
            f"{options.model} ({parameters:,} parameters, {options.num_classes} classes) on {runtime.world_size} x "
            f"{runtime.device.type}, {precision}; {len(splits.training):,} training and {len(splits.validation):,} "
            f"validation images; epochs {self.begin.epoch} to {run.epochs - 1} of {run.updates_per_epoch} updates; "
            f"results in '{self.folder}'"
        )
        if run.sparsity is not None:
            _logger.info(sparsity_words(run.sparsity))

    def add(self, epoch: int, row: Row, metric: float | None, processes: Sequence[Mapping[str, Any]]) -> None:
        """Writes what an epoch came to, and its checkpoint; nothing in the other processes.

        Args:
            epoch: The finished one.
            row: Of the summary.
            metric: Ranks the checkpoint; None where there is none.
            processes: What each of several has of its own.

        Raises:
            NotWritten: There is no space, say.
        """
        run = self.run
        if self.saver is None:
            return
        self.saver.extra = {FLOPS: row.get("train_flops_all_phases", row.get("train_flops", 0.0))}
        self.summary.add(row)  # the row first: a kill in between repeats the epoch and its row
        self.saver.save_checkpoint(epoch, metric, processes)
        if run.sparsity is not None:
            write_table(run.sparsity, self.folder)
        if run.numerics is not None and run.numerics.records:
            run.numerics.save(self.folder, run.options.model)

    def finish(self) -> None:
        """The pictures, and the figures of the whole run in the log."""
        run, options, folder, rows = self.run, self.run.options, self.folder, self.summary.rows
        if self.saver is None:
            return
        if self.begin.epoch >= run.epochs:
            _logger.info(f"'{folder}' is already trained for its {options.epochs} epochs; raise --epochs to go on")
        title = caption(f"{options.model} · {folder.name}")
        if run.sparsity is not None:
            flops = self.flops.report(run.sparsity.steps)
            draw_sparsity(run.sparsity, flops, folder, f"{title} · {options.sparsity_schedule}")
        if rows and "train_flops" in rows[-1]:
            _tell_flops(rows[-1])
        picture = draw_curves(folder, rows, title) if rows else None
        if self.saver.best_metric is not None:
            _logger.info(
                f"best {options.eval_metric} {self.saver.best_metric:.2f} at epoch {self.saver.best_epoch}; "
                f"weights in '{folder / BEST}'" + (f", curves in '{picture}'" if picture else "")
            )


def _brought_back(run: Training, path: Path | None, asked: Asked) -> tuple[dict[str, Any] | None, Position]:
    """Resumes the run, if from anything; the checkpoint, and where it was written."""
    checkpoint, begin, steps = None, Position(0), len(run.data.loader)
    if path is not None:
        optimizer = not run.options.no_resume_opt
        checkpoint = resume(path, run.options.model, run, steps, optimizer=optimizer, asked=asked)
        begin = Position.of(checkpoint, steps)
    if run.scheduler is not None and (begin.epoch or begin.step):
        if begin.epoch:
            run.scheduler.step(begin.epoch)
        run.scheduler.step_update(run.updates_before(begin))
    return checkpoint, begin


def _distributed(model: nn.Module, runtime: Runtime, options: TrainOptions) -> nn.Module:
    devices = None if runtime.device.type == "cpu" else [runtime.device]
    more: dict[str, Any] = (
        {"broadcast_buffers": False} if options.no_ddp_bb else {}
    )  # newer torch warns where the default is named
    model = DistributedDataParallel(model, device_ids=devices, **more)
    settle_buckets(model)
    return model


def _tell_flops(row: Row) -> None:
    recomputed = row.get("train_flops_recomputed", 0)
    _logger.info(f"training FLOPs, by schedule: {row['train_flops']:.4g}, of which {recomputed:.4g} recomputed")
    if "train_flops_all_phases" in row:
        earlier = row["train_flops_all_phases"] - row["train_flops"]
        _logger.info(
            f"with the trainings before it: {earlier:.4g} + {row['train_flops']:.4g} = "
            f"{row['train_flops_all_phases']:.4g} FLOPs"
        )
