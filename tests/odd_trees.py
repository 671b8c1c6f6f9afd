"""Trees of plain values with something odd in them, as anybody may write them to a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

Path_ = tuple[Any, ...]


def paths(tree: Any, here: Path_ = ()) -> list[Path_]:
    """Where something is in a tree."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    found = [(*here, key) for key, _ in entries]
    return found + [path for key, value in entries_of(tree) for path in paths(value, (*here, key))]


def entries_of(tree: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a container; nothing of all else."""
    if isinstance(tree, dict):
        return list(tree.items())
    return list(enumerate(tree)) if isinstance(tree, (list, tuple)) else []


DELETE = object()


def changed(tree: Any, path: Path_, value: Any) -> Any:
    """A copy of the containers, with another value at a path or none (DELETE); as it was where it has no such path."""
    if not path:
        return tree if value is DELETE else value
    key, *rest = path
    if isinstance(tree, dict) and key in tree:
        copy: Any = dict(tree)
    elif isinstance(tree, (list, tuple)) and isinstance(key, int) and key < len(tree):
        copy = list(tree)
    else:
        return tree
    if value is DELETE and not rest:
        del copy[key]
    else:
        copy[key] = changed(copy[key], tuple(rest), value)
    return copy


def write(tree: Any, path: Path) -> None:
    """A file of torch's; its writer, other than its reader, calls itself for what is nested."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(30000)
    try:
        torch.save(tree, path)
    finally:
        sys.setrecursionlimit(limit)


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list[Any]:
    """A list that holds itself."""
    value: list[Any] = [1]
    value.append(value)
    return value


def doubled() -> list[Any]:
    """A small file of 2^60 entries."""
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    return value


ODD: dict[str, Any] = {
    "text": "a",
    "no text": "",
    "minus one": -1,
    "zero": 0,
    "half": 0.5,
    "huge": 2**70,
    "very huge": -(10**400),
    "NaN": float("nan"),
    "infinity": float("inf"),
    "true": True,
    "nothing": None,
    "empty list": [],
    "list": [1, 2],
    "list of text": ["a"],
    "tuple": (0.5,),
    "empty mapping": {},
    "mapping": {"a": 1},
    "numbers as keys": {1: 2, None: 3},
    "bytes": bytearray(b"a"),
    "number in a tensor": torch.tensor(3.0),
    "NaN in a tensor": torch.full((4, 3), float("nan")),
    "tensor": torch.ones(4),
    "empty tensor": torch.zeros(0, 7),
    "whole numbers": torch.ones(4, 3, dtype=torch.int64),
    "flags": torch.ones(4, dtype=torch.bool),
    "complex": torch.ones(4, 3, dtype=torch.complex64),
    "on meta": torch.ones(4, 3, device="meta"),
    "expanded": torch.ones(1).expand(10**12),
    "sparse": torch.eye(4).to_sparse(),
    "deep": nested(300),
    "itself": itself(),
    "doubled": doubled(),
}

WITHOUT_CLOCK: dict[str, Any] = {
    "deadline": None,
    "phases": (Phase.explicit, Phase.reuse, Phase.generate),  # a smaller tree says no more than the message
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
"""Of hypothesis, for its settings."""


def odd_tree(trees: list[Any], data: st.DataObject) -> Any:
    """One of some right trees with one to three odd places."""
    tree = trees[data.draw(st.integers(0, len(trees) - 1), "tree")]
    where = paths(tree)
    short = [path for path in where if len(path) <= 2]  # as often as all the tensors and groups below them
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        among = where if data.draw(st.booleans(), "deep") else short
        path = among[data.draw(st.integers(0, len(among) - 1), "path")]
        odd = data.draw(st.sampled_from(["removed", *ODD]), "odd")
        tree = changed(tree, path, DELETE if odd == "removed" else ODD[odd])
    return tree
