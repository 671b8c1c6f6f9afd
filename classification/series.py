"""Series of runs of train.py on one small data set: started where missing, resumed where broken, put in a table."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from classification.config import Parser
from classification.errors import UserError, whole_file
from classification.options import TrainOptions, as_dict
from classification.report import Row, read_summary

_logger = logging.getLogger("classification")
In = TypeVar("In")
Out = TypeVar("Out")


def series_parser(prog: str, description: str, output: str, images: int) -> Parser:
    """The command line that all series share."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--output", default=output, help="folder of the runs and of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=positive, default=images, help="training images, equally many of each class")
    parser.add_argument("--epochs", type=positive, help="those of the recipe where not given")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at the same time")
    return parser


def positive(text: str) -> int:
    """A whole number from 1, for parsers."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given where a whole number from 1 was expected")
    return int(text)


def writable(output: str) -> Path:
    """The folder, made where it is missing.

    Raises:
        UserError: It cannot be written.
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output: '{output}' cannot be written ({error.strerror}); give another folder.") from error
    return folder


def digest_of(options: TrainOptions) -> str:
    """A word that changes with the recipe or the place of the data."""
    described = {**as_dict(options), "data_dir": str(Path(options.data_dir).resolve())}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]


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
        link.symlink_to((folder / validation).resolve())
    if (made / train).exists():
        return made
    with tarfile.open(folder / train) as source, whole_file(made / train) as path:
        members = sorted((m for m in source if m.isfile()), key=lambda m: m.name)
        classes: dict[str, list[tarfile.TarInfo]] = {}
        for member in members:
            classes.setdefault(str(Path(member.name).parent), []).append(member)
        each, fewest = images // len(classes), min(map(len, classes.values()))
        if not 0 < each <= fewest:
            allowed = f"{len(classes)} to {len(classes) * fewest}"
            raise UserError(f"--images: {images} was given where {allowed} were expected, equally many of each class.")
        with tarfile.open(path, "w") as target:
            for member in (m for found in classes.values() for m in found[:each]):
                target.addfile(member, source.extractfile(member))
    return made


def at_once(jobs: int, function: Callable[[In], Out], wanted: Iterable[In]) -> list[Out]:
    """The function of every element, in order, so many at the same time."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(function, wanted))


def run_training(output: Path, name: str, config: str, data: Path, seed: int, epochs: int, more: Sequence[str]) -> int:
    """Runs train.py as a process with one thread, into a folder and a log of that name; returns its exit code.

    Args:
        output: Folder of the series.
        name: Of the run.
        config: The recipe.
        data: The folder of the images.
        seed: Of the run.
        epochs: To train; validated after the last one only.
        more: Further options.
    """
    command = [sys.executable, "-m", "classification.train", "--config", config, "--data-dir", str(data)]
    command += ["--output", str(output), "--experiment", name, "--resume", "auto", "--seed", str(seed)]
    command += ["--epochs", str(epochs), "--val-interval", str(epochs), *more]
    _logger.info(f"{name}: started")
    with (output / f"{name}.log").open("a") as log:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=Path.cwd(), env=env).returncode


def finished(folder: Path, epochs: int) -> list[Row] | None:
    """The rows of a run that has trained for all its epochs; None of any other."""
    path = folder / "summary.csv"
    rows = read_summary(path) if path.exists() else []
    return rows if rows and rows[-1]["epoch"] == epochs - 1 and "eval_top1" in rows[-1] else None


def failed(output: Path, name: str, code: int) -> UserError:
    """What to say of a run that did not finish."""
    return UserError(f"{name}: the run ended with code {code}; '{output}/{name}.log' says why.")


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """Writes dataclasses of one kind as CSV, a row each."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(each) for each in rows)


def new_figure(path: Path, size: tuple[float, float]) -> Any:
    """A figure of matplotlib for a picture; None, and a line that says so, where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _logger.info(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return None
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Writes the picture, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
