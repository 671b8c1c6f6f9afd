"""Runs of train.py on parts of a data set: started where missing, resumed where broken, known again by their names."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from revnets.training.errors import UserError, one_line
from revnets.training.files import whole_file
from revnets.training.options.parsing import parse

from ..options import TrainOptions, as_dict
from ..run.report import SUMMARY, Row, read_summary

_logger = logging.getLogger("classification")
In = TypeVar("In")
Out = TypeVar("Out")
T = TypeVar("T")
PACKAGE = __name__.rpartition(".tables.")[0]  # that train.py is in


def read_stored(path: Path, use: Callable[[Any], T]) -> T | None:
    """What an earlier series has stored in a JSON file; nothing, and a word, where there is none or it is damaged.

    Args:
        path: The file.
        use: Makes of its content what is wanted, or raises for what is none.
    """
    try:
        return use(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        _logger.warning(f"'{path}' cannot be used ({one_line(error)[:100]}), its run is repeated")
        return None


def digest(values: Mapping[str, Any]) -> str:
    """Eight letters that differ where the values do."""
    return hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()[:8]


def digest_of(options: TrainOptions, *data: Path, **more: Any) -> str:
    """A word that changes with the recipe, the folders of `parts` that it is run on, and what else is given."""
    return digest({**as_dict(options), "data_dir": [folder.name for folder in data], **more})


def read_recipe(config: str, data_dir: str | None, *more: str) -> TrainOptions:
    """The options of a recipe.

    Args:
        config: The recipe.
        data_dir: The data; None: those that the recipe names.
        *more: Further options of train.py.

    Raises:
        UserError: Neither names any.
    """
    options = parse(TrainOptions, ["--config", config, *(["--data-dir", data_dir] if data_dir else []), *more], "")
    if not options.data_dir:
        raise UserError(f"--data-dir: not given, nor by '{config}'; name the folder with its splits, .tar files.")
    return options


def parts(
    options: TrainOptions,
    output: Path,
    images: int,
    val_images: int | None = None,
    word: str = "data",
    classes: Callable[[list[str]], Sequence[str]] = list,
) -> Path:
    """A folder with a part of both splits of a recipe, which are .tar files; see `part_of`.

    Its name changes with where they are, their sizes and when they were written: what was taken of others is not used.

    Args:
        options: Say where they are.
        output: The folder that it is made in.
        images: To train on.
        val_images: To validate on; None takes all.
        word: That its name begins with.
        classes: From the names of all classes to those to take.

    Raises:
        UserError: See `part_of`.
    """
    folder = Path(options.data_dir)
    wanted = {folder / options.train_split: images, folder / options.val_split: val_images}
    origin = digest({str(source.resolve()): _stamp(source) for source in wanted})
    made = output / f"{word}-{images}-{val_images or 'all'}-{origin}"
    made.mkdir(exist_ok=True)
    for source, count in wanted.items():
        part_of(source, made / source.name, count, classes)
    return made


def _stamp(source: Path) -> tuple[int, int]:
    """Size and time of a file.

    Raises:
        UserError: There is none.
    """
    if not source.is_file():
        raise UserError(f"--data-dir: there is no .tar file '{source}'; name the folder of the recipe's splits.")
    return (stat := source.stat()).st_size, stat.st_mtime_ns


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
    _stamp(source)
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


def at_once(jobs: int, function: Callable[[In], Out], wanted: Iterable[In]) -> Iterator[Out]:
    """The function of every element, in order, so many at the same time."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(function, wanted)


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

    @property
    def log(self) -> Path:
        """What it tells."""
        return self.output / f"{self.name}.log"

    def rows(self) -> list[Row]:
        """Of its summary, so far."""
        path = self.output / self.name / SUMMARY
        return read_summary(path) if path.exists() else []

    def finished(self) -> Row | None:
        """The last row of its summary, where it has trained for all its epochs."""
        rows = self.rows()
        return rows[-1] if rows and rows[-1]["epoch"] == self.epochs - 1 and "eval_top1" in rows[-1] else None

    def run(self) -> Row:
        """Trains where that is not done yet.

        Raises:
            UserError: The training failed; its log says why.
        """
        if (row := self.finished()) is not None:
            return row
        command = [sys.executable, "-m", f"{PACKAGE}.train", "--config", self.config, "--output", str(self.output)]
        command += ["--experiment", self.name, "--resume", "auto"]
        command += ["--epochs", str(self.epochs), "--val-interval", str(self.epochs), *self.options]
        _logger.info(f"{self.name}: started")
        with self.log.open("a", encoding="utf-8") as log:
            env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode
        if code or (row := self.finished()) is None:
            raise UserError(f"{self.name}: the run ended with code {code}; '{self.log}' says why.")
        _logger.info(f"{self.name}: top-1 {row['eval_top1']:.2f}%, training loss {row['train_loss']:.4f}")
        return row
