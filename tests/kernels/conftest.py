"""What the tests of the kernel share."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import revnets
from revnets.kernels import build, training


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that the kernel has convolved."""
    seen: list[torch.Size] = []
    plain = training._SparseConv.forward

    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape)
        return plain(ctx, x, *rest)

    monkeypatch.setattr(training._SparseConv, "forward", staticmethod(forward))
    return seen


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revnets.layers.sparse_ift.sparse, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(revnets.layers.sparse_ift.sparse, "pays", lambda *args, **more: True)


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(build.COMPILER_VARIABLE, "none")
    build.load_kernel.cache_clear()
    build.kernel_problem.cache_clear()
    yield
    build.load_kernel.cache_clear()
    build.kernel_problem.cache_clear()
