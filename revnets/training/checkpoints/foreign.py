"""What a checkpoint may decide: how its network is built. Not: what is fetched or read besides; only a user may."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # of timm's names
_REACHING = re.compile(r"(\w+_)?(path|file|filename|url|uri|dir|repo|hub_id)")
_REMOTE = re.compile(r"(hf[-_]hub|local-dir):|\w+://|//|\\\\", re.IGNORECASE)


def reaching_name(model: Any) -> str:
    """What in the name of a model leads elsewhere, in words; nothing for the name of an architecture.

    Example:
        >>> reaching_name("hf-hub:someone/net"), reaching_name("resnet18")
        ("model 'hf-hub:someone/net'", '')
    """
    text = str(model)
    odd = text.startswith(_SOURCES) or _REMOTE.search(text) or text.startswith(("/", ".", "~"))
    return f"model {text[:100]!r}" if odd else ""


def reaching_argument(arguments: Any, given: Collection[str] = ()) -> str:
    """What among a model's arguments has files read or addresses asked, in words; nothing where none does.

    Args:
        arguments: of a model, as a checkpoint has them.
        given: names of those that the user gave, too: theirs win.

    Example:
        >>> reaching_argument({"checkpoint_path": "/etc/passwd"}), reaching_argument({"drop_path_rate": 0.1})
        ("checkpoint_path='/etc/passwd'", '')
    """
    if not isinstance(arguments, Mapping):
        return ""
    for name, value in arguments.items():
        if name not in given and _reaches(str(name), value):
            return f"{name}={str(value)[:100]!r}"
    return ""


def _reaches(name: str, value: Any) -> bool:
    if name.startswith("pretrained"):  # also timm's pretrained_cfg and its overlay
        return bool(value)
    named = _REACHING.fullmatch(name) is not None and isinstance(value, (str, Mapping, list, tuple))  # no drop_path=0.1
    return (named and bool(value)) or _leads_elsewhere(value)


def _leads_elsewhere(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(reaching_argument(value))
    if isinstance(value, (list, tuple)):
        return any(_leads_elsewhere(inner) for inner in value)
    return isinstance(value, str) and _REMOTE.match(value) is not None
