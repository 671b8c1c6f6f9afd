"""What a fault is, and the table of all of them."""

import fnmatch
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AREAS = (
    "reversible",
    "sparsity",
    "layers",
    "models",
    "kernels",
    "training",
    "profiling",
    "budget",
    "retrofit",
    "pruning",
    "numerics",
    "deploy",
    "mm",
    "classification",
    "detection",
)


class TableError(ValueError):
    """A fault of the table that cannot be put in, or a name that is none of it; one sentence."""


@dataclass(frozen=True)
class Fault:
    """One small change for the worse.

    Attributes:
        name: of the fault, unique.
        file: that it is put into, from the root of the project.
        old: text that occurs there once.
        new: what it becomes.
        tests: files (or ids) of the quick tests nearest to it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The text of the file with the fault in it.

        Raises:
            TableError: where the old text does not occur exactly once.
        """
        count = text.count(self.old)
        if count != 1:
            raise TableError(
                f"fault {self.name!r}: its old text occurs {count} times in {self.file}, expected once: bring the table "
                f"in tests/mutants up to date; it is {self.old!r}"
            )
        return text.replace(self.old, self.new)


def table(only: Sequence[str] = ()) -> dict[str, tuple[Fault, ...]]:
    """The faults by area.

    Args:
        only: areas, or names and patterns of names; none: all.

    Raises:
        TableError: for a word that fits nothing.
    """
    every = {area: importlib.import_module(f"{__package__}.{area}").FAULTS for area in AREAS}
    names = [fault.name for faults in every.values() for fault in faults]
    for word in only:
        if word not in AREAS and not fnmatch.filter(names, word):
            raise TableError(f"{word!r} is none of the areas {', '.join(AREAS)}, and fits the name of no fault")
    chosen = {
        area: tuple(f for f in faults if not only or area in only or any(fnmatch.fnmatch(f.name, w) for w in only))
        for area, faults in every.items()
    }
    return {area: faults for area, faults in chosen.items() if faults}
