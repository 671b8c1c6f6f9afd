"""Series of runs of train.py on parts of a data set: started where missing, resumed where broken, put in a table."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from revnets.training.errors import UserError, one_line
from revnets.training.files import whole_file
from revnets.training.options.parsing import SEED, Parser, argument
from revnets.training.places import make_folder

from ..options import TrainOptions, as_dict
from ..report import Row, read_summary

_logger = logging.getLogger("classification")
In = TypeVar("In")
Out = TypeVar("Out")
T = TypeVar("T")


def series_parser(prog: str, description: str, output: str, images: int) -> Parser:
    """The command line that all series share."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--output", type=argument(str, path=True), default=output, help="folder of the runs and of the table"
    )
    parser.add_argument("--seeds", type=argument(int, low=0, high=SEED), nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=positive, default=images, help="training images, equally many of each class")
    parser.add_argument("--epochs", type=positive, help="those of the recipe where not given")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at the same time")
    return parser


positive = argument(int, low=1, high=1 << 31)
share_of_zeros = argument(float, low=0, below=1)


def writable(output: str) -> Path:
    """The folder, made where it is missing.

    Raises:
        UserError: It cannot be written.
    """
    try:
        return make_folder(Path(output))
    except ValueError as error:
        raise UserError(f"--output: {error}.") from error


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


def digest_of(options: TrainOptions) -> str:
    """A word that changes with the recipe or the place of the data."""
    return digest({**as_dict(options), "data_dir": str(Path(options.data_dir).resolve())})


def subset(folder: Path, train: str, validation: str, images: int, made: Path) -> Path:
    """A folder with the first images of every class of a .tar split, and the whole validation split.

    Args:
        folder: Of the two splits.
        train: File name of the training images.
        validation: File name of the validation images.
        images: How many to take, equally many of each class.
        made: The folder; its parent exists.

    Raises:
        UserError: The splits are no .tar files, or hold too few images.
    """
    for split in (train, validation):
        if not (folder / split).is_file():
            raise UserError(f"--config: there is no .tar file '{folder / split}'; correct data_dir and the splits.")
    made.mkdir(exist_ok=True)
    link = made / validation
    if not link.exists():
        link.unlink(missing_ok=True)  # one that led to where the data were
        link.symlink_to((folder / validation).resolve())
    part_of(folder / train, made / train, images)
    return made


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
        raise UserError(f"--config: there is no .tar file '{source}'; correct data_dir and the splits.")
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


def at_once(jobs: int, function: Callable[[In], Out], wanted: Iterable[In]) -> list[Out]:
    """The function of every element, in order, so many at the same time."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(function, wanted))


def run_training(output: Path, name: str, config: str, epochs: int, more: Sequence[str]) -> int:
    """Runs train.py as a process with one thread, into a folder and a log of that name; returns its exit code.

    Args:
        output: Folder of the series.
        name: Of the run.
        config: The recipe.
        epochs: To train; validated after the last one only.
        more: Further options, such as the folder of the images and the seed.
    """
    command = [sys.executable, "-m", "classification.train", "--config", config, "--output", str(output)]
    command += ["--experiment", name, "--resume", "auto"]
    command += ["--epochs", str(epochs), "--val-interval", str(epochs), *more]
    _logger.info(f"{name}: started")
    with (output / f"{name}.log").open("a", encoding="utf-8") as log:
        env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode


def finished(folder: Path, epochs: int) -> list[Row] | None:
    """The rows of a run that has trained for all its epochs; None of any other."""
    path = folder / "summary.csv"
    rows = read_summary(path) if path.exists() else []
    return rows if rows and rows[-1]["epoch"] == epochs - 1 and "eval_top1" in rows[-1] else None


def failed(output: Path, name: str, code: int) -> UserError:
    """What to say of a run that did not finish."""
    return UserError(f"{name}: the run ended with code {code}; '{output}/{name}.log' says why.")


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
        folder = self.output / self.name
        if (rows := finished(folder, self.epochs)) is not None:
            return rows[-1]
        code = run_training(self.output, self.name, self.config, self.epochs, self.options)
        if code or (rows := finished(folder, self.epochs)) is None:
            raise failed(self.output, self.name, code)
        _logger.info(f"{self.name}: top-1 {rows[-1]['eval_top1']:.2f}%")
        return rows[-1]


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """Writes dataclasses of one kind as CSV, a row each."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(each) for each in rows)


def write_table(rows: Sequence[Any], folder: Path) -> None:
    """Writes dataclasses of one kind as `table.csv` and `table.json`."""
    with whole_file(folder / "table.json") as path:
        path.write_text(json.dumps([dataclasses.asdict(each) for each in rows], indent=2) + "\n", encoding="utf-8")
    write_rows(rows, folder / "table.csv")
