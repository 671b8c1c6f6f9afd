"""Checkpoints of an earlier commit, see `checkpoints/README.md`."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent / "checkpoints"


def unpacked(name: str, path: Path) -> Path:
    """One of them, written to a path whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.decompress((FOLDER / f"{name}.xz").read_bytes()))
    return path


def expected() -> dict[str, Any]:
    """What the runs came to."""
    content: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
    return content


def assert_sizes(state: dict[str, torch.Tensor], sizes: dict[str, float]) -> None:
    """Compares weights with the sums of their sizes: machines differ in the last bits."""
    assert state.keys() == sizes.keys()
    found = {name: float(value.double().abs().sum()) for name, value in state.items()}
    assert found == pytest.approx(sizes, rel=1e-3, abs=1e-4)
