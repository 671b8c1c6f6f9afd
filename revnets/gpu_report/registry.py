"""What a report is made of: sections, the rows they are to measure, and what was promised of them."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.options.values import words

Row = dict[str, Any]
"""What was measured: numbers and words by key. ``note`` says what was odd, ``failed`` that it is worth another try."""


class Skipped(Exception):
    """A section cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Column:
    """A column of a section's table.

    Args:
        key: of the rows.
        title: in words, with the unit.
        form: how a value is printed.
    """

    key: str
    title: str
    form: str = "{}"

    def show(self, row: Row) -> str:
        """The value of a row; nothing where it has none."""
        value = row.get(self.key)
        return "" if value is None else self.form.format(value)


@dataclass(frozen=True)
class Target:
    """A promise about a section's rows.

    Args:
        words: what is promised, without the number.
        value: that the rows give, or None where they do not say.
        least: it must not be below.
        most: nor above.
    """

    words: str
    value: Callable[[Sequence[Row]], float | None]
    least: float | None = None
    most: float | None = None

    @property
    def limit(self) -> str:
        """What is wanted."""
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"

    def met(self, value: float) -> bool:
        """Whether a value keeps the promise."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True)
class Context:
    """What a section is told.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        tiny: small networks and few steps, to see that everything runs.
        seconds: that it may take.
        output: folder for what is more than rows.
        before: rows of an earlier run that are good.
        start: when it began, see ``time.monotonic``.
    """

    device: str
    tiny: bool = False
    seconds: float = 60.0
    output: Path = Path()
    before: Sequence[Row] = ()
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.start)


Plan = Callable[[bool], list[Row]]
Measure = Callable[[Context], Iterator[Row]]


@dataclass(frozen=True)
class Section:
    """One part of the report.

    Args:
        letter: by which it is chosen.
        name: a word.
        title: a sentence.
        share: of the minutes, relative to the others'.
        names: columns by which a row is known.
        figures: columns that are measured.
        plan: the rows that there will be (tiny or not), with their names and the ``command`` that measures each.
        measure: gives rows as they are measured. One that was there before is changed, not replaced.
        targets: promises.
        words: what came out, in a few words; by default the number of rows.
    """

    letter: str
    name: str
    title: str
    share: float
    names: tuple[Column, ...]
    figures: tuple[Column, ...]
    plan: Plan
    measure: Measure
    targets: tuple[Target, ...] = ()
    words: Callable[[Sequence[Row]], str] = lambda rows: ""

    def identity(self, row: Row) -> tuple[str, ...]:
        """By which a row is known."""
        return tuple(str(row.get(column.key, "")) for column in self.names)

    def merged(self, rows: Sequence[Row]) -> list[Row]:
        """One row per identity: the later ones change the earlier."""
        found: dict[tuple[str, ...], Row] = {}
        for row in rows:
            former = found.setdefault(self.identity(row), {})
            if former.pop("failed", False):
                former.pop("note", None)
            former.update(row)
        return list(found.values())

    def good(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that need not be measured again."""
        return [row for row in self.merged(rows) if not row.get("failed")]

    def missing(self, rows: Sequence[Row], tiny: bool) -> list[Row]:
        """The planned rows that are still to be measured."""
        done = {self.identity(row) for row in self.good(rows)}
        return [row for row in self.plan(tiny) if self.identity(row) not in done]

    def complete(self, rows: Sequence[Row], tiny: bool) -> list[Row]:
        """All rows in the order of the plan, blank where nothing was measured, with their commands; others follow."""
        found = {self.identity(row): row for row in self.merged(rows)}
        planned = [{**row, **found.pop(self.identity(row), {})} for row in self.plan(tiny)]
        return [*planned, *found.values()]


class Registry:
    """Sections by letter. Letters are in order of value."""

    def __init__(self) -> None:
        self.sections: dict[str, Section] = {}

    def section(self, letter: str, name: str, title: str, **more: Any) -> Callable[[Measure], Measure]:
        """Register the decorated function as what measures a section; the arguments are those of ``Section``.

        Raises:
            ValueError: there is one of this letter.
        """

        def register(measure: Measure) -> Measure:
            if letter in self.sections:
                raise ValueError(f"section {letter!r} is there twice: give {name} another letter")
            self.sections[letter] = Section(letter, name, title, measure=measure, **more)
            return measure

        return register


REPORT = Registry()
"""The sections of ``revnets gpu-report``."""

CATALOG = "revnets.gpu_report.sections"


def load(catalog: str = CATALOG) -> Mapping[str, Section]:
    """The sections of a module that has a ``REPORT``, by letter, in order of value."""
    sections: Mapping[str, Section] = importlib.import_module(catalog).REPORT.sections
    return dict(sorted(sections.items()))


def choose(text: str, sections: Mapping[str, Section]) -> list[Section]:
    """The sections of a list of letters or names, in order of value; all for an empty text.

    Raises:
        ValueError: for what does not exist.

    Example:
        >>> [section.name for section in choose("c,a", load())]
        ['machine', 'networks']
    """
    by_name = {section.name: letter for letter, section in sections.items()}
    wanted = words("--sections", text) if text else list(sections)
    letters = [by_name.get(word, word) for word in wanted]
    for word, letter in zip(wanted, letters, strict=True):
        if letter not in sections:
            known = ", ".join(f"{s.letter} ({s.name})" for s in sections.values())
            raise ValueError(f"unknown section {word!r}: expected some of {known}")
    return [section for letter, section in sections.items() if letter in letters]


def first(rows: Sequence[Row], key: str, /, **names: Any) -> float | None:
    """The value of the first row of these names that has one.

    Example:
        >>> first([{"mode": "store", "ms": 3.0}], "ms", mode="store")
        3.0
    """
    for row in rows:
        if row.get(key) is not None and all(row.get(name) == wanted for name, wanted in names.items()):
            return float(row[key])
    return None
