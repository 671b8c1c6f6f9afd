"""What keeps tests from seeing each other."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nothing_of_mmengine_left() -> Iterator[None]:
    """MMEngine keeps for good: its loggers, with the standard output of their test, closed by now; the last scope."""
    yield
    if "mmengine.logging" in sys.modules:
        sys.modules["mmengine.logging"].MMLogger._instance_dict.clear()
    if "mmengine.registry" in sys.modules:
        sys.modules["mmengine.registry"].DefaultScope._instance_dict.clear()
