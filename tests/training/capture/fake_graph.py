"""A stand-in for CUDA graphs, which lets the code around them be tested without a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


class FakeGraph:
    """Records a step without doing it, and does it at every replay: as a graph, but slowly."""

    captures = 0

    def __init__(self, device: torch.device) -> None:
        self.run: Callable[[], None] = lambda: None

    @staticmethod
    def exists(device: torch.device) -> bool:
        return True

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def capture(self, run: Callable[[], None]) -> None:
        type(self).captures += 1
        self.run = run

    def replay(self) -> None:
        with pytest.MonkeyPatch.context() as patch:  # what a capture does not allow
            patch.setattr(torch, "get_rng_state", _forbidden)
            patch.setattr(Tensor, "item", _forbidden)
            patch.setattr(Tensor, "tolist", _forbidden)
            patch.setattr(Tensor, "__bool__", _forbidden)
            self.run()

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        return values.tolist


def _forbidden(*_: Any) -> Any:
    raise AssertionError("a graph asks neither device nor generator")
