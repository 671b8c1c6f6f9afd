"""What the recorder has to know of an operator, found out once."""

from __future__ import annotations

from typing import Any

from . import recipes

TWO_TENSORS = ("add", "mul")
"""Whose result is as large as the larger one."""


class Kind:
    """What an operator does, as far as it matters here."""

    __slots__ = (
        "again",
        "batch_norm",
        "code",
        "copies",
        "inplace",
        "keeps_shape",
        "moves",
        "name",
        "nothing",
        "view",
        "weight",
        "writes",
    )

    def __init__(self, func: Any) -> None:
        self.name, self.weight = recipes.name_of(func).removesuffix("_"), recipes.weight(func)
        self.view = recipes.is_view(func)
        self.writes = recipes.writes(func)
        self.again = None if self.view else recipes.cheap(func)
        self.inplace = None if self.again is None else recipes.in_place(func)
        self.batch_norm = self.again is not None and recipes.is_batch_norm(func)
        self.copies = self.name == "clone"
        self.moves = self.name in recipes.MOVES
        self.keeps_shape = self.batch_norm or (self.inplace is not None and self.name not in TWO_TENSORS)
        self.code = recipes.CODES.get(recipes.name_of(func))
        self.nothing = not (self.view or self.writes or self.again or self.code)


KINDS: dict[Any, Kind] = {}
"""Of the operators that were met."""


def kind_of(func: Any) -> Kind:
    """What a new operator does."""
    kind = KINDS[func] = Kind(func)
    return kind
