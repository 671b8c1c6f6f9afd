"""What keeps tests from seeing each other, and the devices that they run on."""

import contextlib
import gc
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Any:
    """Every device there is: a fault in a test for GPUs is then seen where there is none."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _nothing_of_mmengine_left() -> Iterator[None]:
    """MMEngine keeps for good: loggers, with the standard output of their test, closed by now; scopes; notes of a run.

    The last by the run's name and second: a test that follows within it would go on from another's notes.
    """
    yield
    if "mmengine.logging" in sys.modules:
        sys.modules["mmengine.logging"].MMLogger._instance_dict.clear()
        sys.modules["mmengine.logging"].MessageHub._instance_dict.clear()
    if "mmengine.registry" in sys.modules:
        sys.modules["mmengine.registry"].DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    """What a file of tests imported and cached stays: looking through it at each collection takes long."""
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or libraries that count what they leave behind complain at the end."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """How a process of tests died: xdist says only that it did."""
    if error is not None:
        with contextlib.suppress(AttributeError, subprocess.TimeoutExpired):
            code = node.gateway._io.popen.wait(10)
            how = signal.Signals(-code).name if code < 0 else f"code {code}"
            sys.__stderr__.write(f"\n[{node.gateway.id}] ended with {how}\n")
