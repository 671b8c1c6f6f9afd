"""Trees of plain values of anybody's: whether they can be gone through, and how messages call what is in them."""

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 64  # of nested containers; a checkpoint has about eight
ENTRIES = 1_000_000  # of all containers together; a checkpoint has thousands
_VIEW = 1 << 20  # numbers that a tensor may have beyond those of its memory, as an expanded one has
_CONTAINERS = (Mapping, list, tuple, set, frozenset, Namespace)

Path = tuple[Any, ...]


class Mismatch(ValueError):
    """An entry that is not what a schema says; the message names where it is, what it is, and what was expected.

    Args:
        path: Keys and positions from the root.
        words: The rest of the sentence.

    Example:
        >>> raise Mismatch(("optimizer", "state", 3, "step"), "is 'a', a number was expected")
        Traceback (most recent call last):
        revnets.training.checkpoints.tree.Mismatch: optimizer.state[3].step is 'a', a number was expected
    """

    def __init__(self, path: Path, words: str) -> None:
        super().__init__(f"{where(path)} {words}")
        self.path = path


def sound(content: Any) -> None:
    """Refuse a tree that cannot be walked or copied, whatever it is meant to hold.

    Nested too deep, holding itself, or with a tensor that has no memory, a layout of its own, or far more numbers than
    its memory. Each container is gone through once, without recursion, so that any file is done in good time.

    Args:
        content: As it was read, a container.

    Raises:
        Mismatch: Naming the entry.

    Example:
        >>> sound({"state_dict": {"weight": torch.zeros(2, device="meta")}})
        Traceback (most recent call last):
        revnets.training.checkpoints.tree.Mismatch: state_dict.weight is a tensor without memory (device meta), give its values
    """  # noqa: E501
    known: dict[int, tuple[int, int]] = {}  # containers that are done: entries, of all within, and depth
    stack: list[_Visit] = [_Visit((), content)]
    while stack:
        here = stack[-1]
        for key, value in here.rest:
            if isinstance(value, Tensor) and (problem := unusable(value)):
                raise Mismatch((*here.path, key), f"is {problem}, give its values")
            if isinstance(value, _CONTAINERS) and id(value) not in known:
                if len(stack) >= DEPTH:
                    raise _too_deep(here.path)
                stack.append(_Visit((*here.path, key), value))
                break
            entries, depth = known.get(id(value), (0, 0))
            here.add(1 + entries, depth)
            if here.entries > ENTRIES:
                raise Mismatch(here.path[:3], f"holds more than {ENTRIES:,} entries")
            if len(stack) + depth > DEPTH:
                raise _too_deep(here.path)
        else:
            known[id(here.value)] = here.entries, here.depth + 1
            stack.pop()
            if stack:
                stack[-1].add(1 + here.entries, here.depth + 1)


class _Visit:
    """A container that is being gone through."""

    def __init__(self, path: Path, value: Any) -> None:
        inside = vars(value) if isinstance(value, Namespace) else value
        self.path, self.value = path, value
        self.rest = iter(inside.items() if isinstance(inside, Mapping) else enumerate(inside))
        self.entries = self.depth = 0

    def add(self, entries: int, depth: int) -> None:
        self.entries, self.depth = self.entries + entries, max(self.depth, depth)


def _too_deep(path: Path) -> Mismatch:
    return Mismatch(path[:3], f"is nested more than {DEPTH} deep, plain values were expected")


def where(path: Path) -> str:
    """A path as one reads it: ``optimizer.state[3].step``.

    Example:
        >>> where(("state_dict", "conv1.weight")), where(())
        ("state_dict['conv1.weight']", 'the file')
    """
    text = ""
    for key in path:
        plain = isinstance(key, str) and key.isidentifier() and len(key) <= 60
        text += (("." if text else "") + key) if plain else f"[{described(key)}]" if text else described(key)
    return text or "the file"


def described(value: Any) -> str:
    """A value in a few words, however large or odd it is.

    Example:
        >>> described("a"), described([1, 2]), described(torch.zeros(2, 3)), described(10**30)
        ("'a'", 'a list of 2', 'a tensor of shape (2, 3)', 'a number of 31 digits')
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.layout == torch.strided else "a sparse tensor"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    if value is None or isinstance(value, (bool, int, float)):
        return str(value) if value is not None else "nothing"
    return f"of type {type(value).__name__}"


def unusable(tensor: Tensor) -> str:
    """What is wrong with a tensor, whatever its numbers; or nothing."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"a tensor of type {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        return "a sparse, nested or quantized tensor"
    if tensor.device.type == "meta":
        return "a tensor without memory (device meta)"
    memory = tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1)
    if tensor.numel() > memory + _VIEW:
        return f"a tensor of {tensor.numel():,} numbers in memory for {memory:,}"
    return ""
