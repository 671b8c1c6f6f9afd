"""What tables of several trainings need: parts of data sets, and trainings that go on where they stopped."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from classification.errors import UserError, whole_file
from classification.report import Row, read_summary

_logger = logging.getLogger("classification")


def positive(text: str) -> int:
    """A whole number from 1, of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given where a whole number from 1 was expected")
    return int(text)


def open_output(path: str) -> Path:
    """A folder for the output, made if it is missing.

    Raises:
        UserError: It cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output: '{folder}' cannot be written ({error.strerror}); give another folder.") from error
    return folder


def digest(values: Mapping[str, Any]) -> str:
    """Eight letters that differ where the values do."""
    return hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()[:8]


def part_of(source: Path, made: Path, images: int | None, classes: Callable[[list[str]], Sequence[str]] = list) -> Path:
    """A .tar file with the first images of every class of another one.

    Args:
        source: A .tar file of class folders.
        made: The new file, in an existing folder; there is nothing to do where it exists.
        images: How many to take, equally many of each class; None takes all.
        classes: From the sorted names of all classes to those to take.

    Raises:
        UserError: There is no such file, or it holds too few images.
    """
    if made.exists():
        return made
    if not source.is_file():
        raise UserError(f"--configs: there is no .tar file '{source}'; correct data_dir and the splits.")
    with tarfile.open(source) as file, whole_file(made) as path:
        found: dict[str, list[tarfile.TarInfo]] = {}
        for member in sorted((m for m in file if m.isfile()), key=lambda m: m.name):
            found.setdefault(str(Path(member.name).parent), []).append(member)
        taken = {name: found[name] for name in classes(sorted(found))}
        fewest = min(map(len, taken.values()))
        each = max(map(len, taken.values())) if images is None else images // len(taken)
        if each < 1 or (images is not None and each > fewest):
            allowed = f"{len(taken)} to {len(taken) * fewest}"
            raise UserError(f"--images: {images} was given where {allowed} were expected, equally many of each class.")
        with tarfile.open(path, "w") as target:
            for member in (m for members in taken.values() for m in members[:each]):
                target.addfile(member, file.extractfile(member))
    return made


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training: a process of train.py with one thread, whose last row of the summary is its result.

    Args:
        name: Of its folder, which says all that it differs in.
        config: The recipe.
        output: Folder of all runs.
        epochs: Of the training; it is validated after the last one only.
        options: Further options of train.py.
    """

    name: str
    config: str
    output: Path
    epochs: int
    options: tuple[str, ...] = ()

    @property
    def weights(self) -> Path:
        """Its last checkpoint."""
        return self.output / self.name / "last.pth.tar"

    def run(self) -> Row:
        """Trains where that is not done yet.

        Raises:
            UserError: The training failed; its log says why.
        """
        if (row := self._finished()) is not None:
            return row
        command = [sys.executable, "-m", "classification.train", "--config", self.config, "--output", str(self.output)]
        command += ["--experiment", self.name, "--resume", "auto", "--epochs", str(self.epochs)]
        command += ["--val-interval", str(self.epochs), *self.options]
        _logger.info(f"{self.name}: started")
        log_file = self.output / f"{self.name}.log"
        with log_file.open("a", encoding="utf-8") as log:
            env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode
        row = self._finished()
        if code or row is None:
            raise UserError(f"{self.name}: the run ended with code {code}; '{log_file}' says why.")
        _logger.info(f"{self.name}: top-1 {row['eval_top1']:.2f}%")
        return row

    def _finished(self) -> Row | None:
        path = self.output / self.name / "summary.csv"
        row = read_summary(path)[-1] if path.exists() else {}
        return row if row.get("epoch") == self.epochs - 1 and "eval_top1" in row else None
