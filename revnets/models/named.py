"""Networks by the names that timm knows, and one sentence for what it refuses."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

from ..training.values import refused


def check_model(name: str) -> str:
    """The name, if timm knows a network, and weights where it names some (``resnet50.a1_in1k``).

    Raises:
        ValueError: it does not; says which names are near.

    Example:
        >>> check_model("resnet18")
        'resnet18'
    """
    architecture = name.partition(".")[0]
    if not architecture or not timm.is_model(architecture):
        known = timm.list_models()
        near = ", ".join(difflib.get_close_matches(name, known, 3, 0.5))
        raise ValueError(
            f"unknown model {name[:100]!r}: " + (f"did you mean {near}?" if near else "timm.list_models() names all")
        )
    if "." in name and name not in (tags := timm.list_pretrained(f"{architecture}.*")):
        raise ValueError(f"unknown weights {name!r}: expected {' or '.join([architecture, *tags])}")
    return name


def build_model(name: str, why: str = "", kind: type[ValueError] = ValueError, **arguments: Any) -> nn.Module:
    """What ``timm.create_model`` makes.

    Args:
        name: known to timm.
        why: begins the message; by default, that the network cannot be made.
        kind: of the error.
        arguments: of ``timm.create_model``.

    Raises:
        kind: for a network that refuses its arguments.
    """
    with refused(why or f"{name} cannot be made", kind):
        model: nn.Module = timm.create_model(name, **arguments)
    return model
