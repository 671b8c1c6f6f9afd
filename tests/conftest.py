"""What keeps tests from seeing each other."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_loggers_left() -> Iterator[None]:
    """MMEngine keeps its loggers for good, with the standard output of the test in which they were made: closed."""
    yield
    if "mmengine.logging" in sys.modules:
        sys.modules["mmengine.logging"].MMLogger._instance_dict.clear()
