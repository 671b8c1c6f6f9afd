"""What all tables do: lines of several outcomes, cells, files."""

import dataclasses
import json
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from classification.tables import runner
from classification.tables.runner import Column, Outcomes, against, flag, mean, same


@dataclasses.dataclass(frozen=True)
class Outcome:
    name: str
    top1: float
    losses: list[float] = dataclasses.field(default_factory=list)


DONE = [Outcome("dense", 50.0, [1.0]), Outcome("sparse", 60.0), Outcome("dense", 52.0), Outcome("broken", math.nan)]


class Table(runner.Table):
    folder = "some_table"
    description = "Some."
    options = (flag("--count", type=runner.positive, default=4),)
    columns = (
        Column("name", same("name")),
        Column("runs", runner.count),
        Column("top-1", mean("top1")),
        Column("std", runner.spread),
        Column("against dense", against("dense")),
    )

    def outcomes(self) -> Iterator[Outcome]:
        yield from DONE[: self.args.count]

    def line(self, outcome: Outcome) -> str:
        return outcome.name

    def draw(self, figure: Any, done: Outcomes) -> None:
        figure.subplots().plot([each.top1 for each in done])


def test_lines_are_compared() -> None:
    grid = Table(Namespace(output="")).shown(DONE)
    assert list(zip(*(column._cells for column in grid.columns), strict=True)) == [
        ("dense", "2", "51.00", "1.41", "+0.00"),
        ("sparse", "1", "60.00", "-", "+9.00"),
        ("broken", "1", "-", "-", "-"),
    ]


def test_files_and_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Table.main(["--output", str(tmp_path / "a" / "b")]) == 0
    assert "+9.00" in capsys.readouterr().out
    folder = tmp_path / "a" / "b"
    content = json.loads((folder / "table.json").read_text())
    assert [each["top1"] for each in content] == [50.0, 60.0, 52.0, None]
    assert content[0]["losses"] == [1.0]
    assert (folder / "table.csv").read_text().splitlines()[:2] == ["name,top1", "dense,50.0"]
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Table.main(["--count", "0", "--output", str(tmp_path / "a")]) == 2
    assert "--count: '0'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert Table.main(["--cuont", "1"]) == 2
    assert "--help` lists all options" in capsys.readouterr().err
