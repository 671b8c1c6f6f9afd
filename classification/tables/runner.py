"""What every table of experiments does: run what is missing, write and draw what came out, and print it."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import rich.table
from rich.console import Console

from revnets.training.errors import UserError, guarded
from revnets.training.files import write_csv, write_json
from revnets.training.options.parsing import SEED, Parser, argument
from revnets.training.pictures import picture
from revnets.training.places import make_folder

Outcomes = Sequence[Any]  # dataclasses of one kind: a run each, and what it came to
Lines = Mapping[Any, Outcomes]
positive = argument(int, low=1, high=1 << 31)
share_of_zeros = argument(float, low=0, below=1)
seed = argument(int, low=0, high=SEED)
Flag = tuple[str, dict[str, Any]]


def flag(name: str, **how: Any) -> Flag:
    """An option of the command line, in the words of argparse."""
    return name, how


SEEDS = flag("--seeds", type=seed, nargs="+", default=[0, 1, 2])
DATA = flag(
    "--data-dir", type=argument(str, path=True), help="folder of the splits, .tar files; the recipe's where not given"
)


def series(images: int) -> tuple[Flag, ...]:
    """The options of tables whose runs differ in seeds."""
    return (
        DATA,
        SEEDS,
        flag("--images", type=positive, default=images, help="training images, equally many of each class"),
        flag("--epochs", type=positive, help="those of the recipe where not given"),
        flag("--jobs", type=positive, default=1, help="runs at the same time"),
    )


@dataclasses.dataclass(frozen=True)
class Column:
    """A heading, and what stands below it: words for the outcomes of a line, which may be compared with other lines."""

    heading: str
    cell: Callable[[Outcomes, Lines], str]


class Table:
    """A comparison of trainings. A kind of it declares its options, its runs, its columns and its picture.

    Args:
        args: Of its command line.
    """

    folder: ClassVar[str]  # within output/
    description: ClassVar[str]
    options: ClassVar[tuple[Flag, ...]]
    title: ClassVar[str | None] = None
    columns: ClassVar[tuple[Column, ...]]
    picture: ClassVar[str] = "table.png"

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.output = Path(args.output)

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> int:
        """Runs the script; returns its exit code: 2 after a user mistake."""

        def run() -> None:
            parser = Parser(description=cls.description)
            path, folder = argument(str, path=True), f"output/{cls.folder}"
            parser.add_argument("--output", type=path, default=folder, help="folder of the runs and of the table")
            for name, how in cls.options:
                parser.add_argument(name, **how)
            cls(parser.parse_args(argv)).run()

        return guarded(run)

    def check(self) -> None:
        """What can be refused before anything is written.

        Raises:
            UserError: Naming the option.
        """

    def outcomes(self) -> Iterator[Any]:
        """Trains what is missing, and gives each outcome as soon as it is there."""
        raise NotImplementedError

    def line(self, outcome: Any) -> Hashable:
        """The line of the table that an outcome belongs to, with those of other seeds; else each has its own."""
        return id(outcome)

    def draw(self, figure: Any, done: Outcomes) -> None:
        """Draws the picture."""
        raise NotImplementedError

    def words(self, done: Outcomes) -> list[str]:
        """What is printed below the table."""
        return []

    def run(self) -> list[Any]:
        """Trains what is missing, writes the table and its picture, and prints it.

        Returns:
            The outcomes.

        Raises:
            UserError: No data, an option that cannot be, or a run that failed.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.check()
        try:
            make_folder(self.output)
        except ValueError as error:
            raise UserError(f"--output: {error}.") from error
        done: list[Any] = []
        for outcome in self.outcomes():
            done.append(outcome)
            self.write(done)
        picture(self.output / self.picture, (8, 4.5), lambda figure: self.draw(figure, done), dpi=150)
        console = Console(width=140)
        console.print(self.shown(done))
        for words in self.words(done):
            console.print(words)
        return done

    def write(self, done: Outcomes) -> None:
        """Writes `table.csv`, a row per outcome, and `table.json`, with what is more than a number or a word, too."""
        rows = [dataclasses.asdict(each) for each in done]
        write_json(self.output / "table.json", rows)
        plain = [{name: value for name, value in row.items() if not isinstance(value, (dict, list))} for row in rows]
        write_csv(self.output / "table.csv", plain)

    def lines(self, done: Outcomes) -> dict[Any, list[Any]]:
        """The outcomes by line, in order."""
        found: dict[Any, list[Any]] = {}
        for outcome in done:
            found.setdefault(self.line(outcome), []).append(outcome)
        return found

    def shown(self, done: Outcomes) -> rich.table.Table:
        """The table for the terminal."""
        grid = rich.table.Table(*(column.heading for column in self.columns), title=self.title)
        lines = self.lines(done)
        for found in lines.values():
            grid.add_row(*(column.cell(found, lines) for column in self.columns))
        return grid


# --- cells -----------------------------------------------------------------------------------------------------------


def number(value: float, form: str = ".2f") -> str:
    """A number in a cell; a dash where there is none."""
    return format(value, form) if math.isfinite(value) else "-"


def finite(outcomes: Outcomes, name: str) -> list[float]:
    """One figure of all outcomes that have it."""
    return [value for value in (getattr(each, name) for each in outcomes) if math.isfinite(value)]


def average(outcomes: Outcomes, *names: str) -> float:
    """The mean of a figure, or of a sum of figures; NaN where no outcome has it."""
    values = [finite(outcomes, name) for name in names]
    return sum(statistics.mean(each) for each in values) if all(values) else math.nan


def same(name: str, form: str = "") -> Callable[[Outcomes, Lines], str]:
    """The value that all outcomes of a line share."""
    return lambda found, _: format(getattr(found[0], name), form)


def mean(name: str, form: str = ".2f", unit: float = 1.0) -> Callable[[Outcomes, Lines], str]:
    """Mean of a figure over the outcomes of a line."""
    return lambda found, _: number(average(found, name) / unit, form)


def count(found: Outcomes, _: Lines) -> str:
    """How many outcomes a line has."""
    return str(len(found))


def spread(found: Outcomes, _: Lines) -> str:
    """The standard deviation of top-1, where there are several."""
    top1 = finite(found, "top1")
    return f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "-"


def against(line: Any) -> Callable[[Outcomes, Lines], str]:
    """Mean top-1 less that of another line."""
    return lambda found, lines: number(average(found, "top1") - average(lines.get(line, ()), "top1"), "+.2f")
