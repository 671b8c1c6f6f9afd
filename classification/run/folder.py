"""Where the files of a run go and what it goes on from, decided while no other run can be there."""

from __future__ import annotations

import glob
import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from revnets.numerics.report import FILES as NUMERICS_FILES
from revnets.numerics.report import read_table
from revnets.training.errors import UserError, one_line
from revnets.training.files import TEMPORARY, leftovers, obstacle, remove_all
from revnets.training.lock import FolderLock, InUse

from ..networks.sparse import FILES as SPARSITY_FILES
from ..options import TrainOptions
from .checkpoints import PATTERN, by_age, is_checkpoint, newest_whole
from .report import ARGS, SUMMARY, read_summary

_logger = logging.getLogger("classification")
FILES = (SUMMARY, "curves.png", *SPARSITY_FILES, *NUMERICS_FILES)


class RunFolder:
    """The folder of a run, held against other runs until it is closed.

    Without `--experiment` it is the first of NAME, NAME-1, NAME-2 ... that neither holds a run nor is in use, or, with
    `--resume auto`, the one that was written to last. Nothing in it is read or written before it is held.

    Args:
        options: All options.
        size: Side of the images, for the name of a run that has none.

    Raises:
        UserError: It holds a run, or another one is in it; or what is in it is none of a run's.
    """

    def __init__(self, options: TrainOptions, size: int) -> None:
        self._options = options
        self._locks = ExitStack()
        self._first = Path(options.output) / (options.experiment or f"{options.model.replace('/', '_')}-{size}")
        self.path = self._first
        self.checkpoint: Path | None = None  # to go on from
        try:
            self._lock = self._newest() if options.resume == "auto" else self._free()
            self._check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives it back."""
        self._locks.close()

    def clear(self) -> None:
        """Removes what a kill left half-written and, for `--overwrite`, the run that was there before.

        Raises:
            UserError: A file cannot be deleted; all are still there.
        """
        if self._options.overwrite and self.checkpoint is None:
            try:
                remove_all([path for path in self.path.iterdir() if path.name in FILES or is_checkpoint(path.name)])
            except OSError as error:
                raise UserError(
                    f"--overwrite: '{error.filename}' cannot be deleted ({error.strerror}); delete it or give another "
                    "--experiment."
                ) from error
        if self._lock.known:  # else they might be those of a run that is writing them now
            for left in leftovers(self.path, writes):
                with suppress(OSError):
                    left.unlink()

    def _hold(self, folder: Path) -> FolderLock:
        lock = self._locks.enter_context(FolderLock(folder, "give another --output or --experiment"))
        self.path = folder
        return lock

    def _newest(self) -> FolderLock:
        """For `--resume auto`."""
        for folder in self._by_age():
            lock = self._hold(folder)
            self.checkpoint = newest_whole(folder, own=True)
            if self.checkpoint is not None:
                return lock
            lock.release()
        first = self._first
        _logger.info(f"--resume auto: no checkpoint in '{first}', starting from the beginning")
        return self._hold(first)

    def _by_age(self) -> list[Path]:
        """Folders that may hold the run to go on with, the one that was written to last first."""
        first = self._first
        if self._options.experiment:
            return [first]
        found = [first, *first.parent.glob(f"{glob.escape(first.name)}-[0-9]*")]
        ages = {folder: files[0].stat().st_mtime_ns for folder in found if (files := by_age(folder, own=True))}
        return sorted(ages, key=lambda folder: ages[folder], reverse=True)

    def _free(self) -> FolderLock:
        """For a new run, or one that goes on from a given checkpoint."""
        options = self._options
        self.checkpoint = Path(options.resume) if options.resume else None
        first = self._first
        here = os.path.dirname(os.path.realpath(options.resume)) == os.path.realpath(first) if options.resume else False
        for number in self._numbers():
            wanted = number == 0 and (here or options.overwrite)
            try:
                lock = self._hold(first.with_name(f"{first.name}-{number}") if number else first)
            except InUse:
                if wanted or options.experiment:
                    raise
                continue
            if wanted or not _holds_run(self.path):
                return lock
            lock.release()
        raise UserError(
            f"--experiment: '{first}' already holds a run; add --resume auto to go on with it, --overwrite to start "
            "anew, or give another name."
        )

    def _numbers(self) -> Iterator[int]:
        return iter([0]) if self._options.experiment else itertools.count()

    def _check(self) -> None:
        """Whether the files of a run have room, and can be gone on with."""
        if problem := obstacle(self.path, writes):
            raise UserError(
                f"--experiment: {problem}, where a run has files of its own; move it away or give another name."
            )
        if self.checkpoint is None:
            return
        if (self.path / SUMMARY).exists():
            read_summary(self.path / SUMMARY)
        if self._options.numerics_interval:
            try:
                read_table(self.path)
            except ValueError as error:
                raise UserError(f"--resume: {one_line(error)}.") from error


def writes(name: str) -> bool:
    """Whether a run writes a file of that name."""
    return name in (ARGS, *FILES) or is_checkpoint(name)


def _holds_run(folder: Path) -> bool:
    saved = (path for path in folder.glob(PATTERN) if not path.name.startswith(TEMPORARY))
    return os.path.lexists(folder / SUMMARY) or any(saved)
