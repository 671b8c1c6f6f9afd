"""A YAML file of options as plain values: a small, regular file, every key once, nothing that runs code."""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, one_line

BYTES = 1 << 20
VALUES = 100_000  # after aliases are written out


class DuplicateKey(yaml.YAMLError):
    """A key is there twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, which would let the last of two equal keys win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose own keys differ; those that `<<` merges in may come again."""
        lines: dict[Hashable, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if not isinstance(key.value, str):
                continue
            if name in lines:
                raise DuplicateKey(f"key '{key.value}' is in line {lines[name]} and again in line {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)


def load(path: Path, origin: str) -> dict[str, Any]:
    """Reads one file.

    Args:
        path: The file.
        origin: Where the path was named, for messages.

    Returns:
        Its keys and values, empty for an empty file.

    Raises:
        UserError: No such file, or a folder, a pipe or a device; too large; not YAML; a key twice; no mapping of names.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{origin}: '{path}' is a folder or a device; give an existing YAML file.")
        with open(path, "rb") as file:
            data = file.read(BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{origin}: '{path}' cannot be read ({reason}); give an existing YAML file.") from None
    if len(data) > BYTES:
        raise UserError(f"{origin}: '{path}' is larger than {BYTES:,} bytes; options take far less, give another file.")
    try:
        content = yaml.load(data.decode("utf-8"), _Loader)
    except RecursionError:
        raise UserError(f"{origin}: '{path}' is nested too deep; give plain `key: value` lines.") from None
    except Exception as error:  # PyYAML's constructors let ValueError, KeyError, IndexError and others through
        raise UserError(f"{origin}: '{path}' is not valid YAML ({one_line(error)[:400]}); correct it.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{origin}: '{path}' holds {type(content).__name__} where `key: value` lines were expected.")
    odd = [key for key in content if not isinstance(key, str)]
    if odd:
        raise UserError(f"{origin}: '{path}' has the key {odd[0]!r}, the name of an option was expected; correct it.")
    if _more_values_than(VALUES, content):
        raise UserError(f"{origin}: '{path}' holds more than {VALUES:,} values with all aliases written out; cut it.")
    return content


def _more_values_than(limit: int, content: Any) -> bool:
    """Whether aliases, which share values, would make a file much larger, or endless."""
    waiting, count = [content], 0
    while waiting and count <= limit:
        value = waiting.pop()
        count += 1
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
    return count > limit
