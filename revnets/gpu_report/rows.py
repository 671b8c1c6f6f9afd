"""What most sections do: their rows one after the other, of which none takes the others with it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from ..training.errors import reason
from .registry import Context, Row
from .timing import release


def todo(context: Context, planned: Sequence[Row]) -> list[Row]:
    """The planned rows that were not measured before."""
    return [row for row in planned if not any(_names(row).items() <= done.items() for done in context.before)]


def row_by_row(
    context: Context, planned: Sequence[Row], figures: Callable[[Row], Row], least: float = 2.0
) -> Iterator[Row]:
    """Measure what is to be measured, row by row, as long as there is time.

    Args:
        context: of the section.
        planned: its rows, as its plan names them.
        figures: of a planned row; whatever it raises makes a row that failed.
        least: seconds that have to be left to begin one.

    Yields:
        names and figures.
    """
    for row in todo(context, planned):
        if context.left < least:
            return
        yield {**_names(row), **_measured(row, figures)}
        release(torch.device(context.device))


def _measured(row: Row, figures: Callable[[Row], Row]) -> Row:
    try:
        return figures(row)
    except Exception as error:  # of a driver, a compiler, another library
        traceback.print_exc()
        return failure(error)


def failure(error: Exception) -> Row:
    """What a row says whose measurement failed."""
    return {"note": reason(error), "failed": True}


def _names(row: Row) -> Row:
    """A planned row without its command: by which it is known."""
    return {key: value for key, value in row.items() if key != "command"}
