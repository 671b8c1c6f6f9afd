"""A CUDA graph as a training step uses it: the only part that needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import one_line


class CaptureError(RuntimeError):
    """A part of a training that no CUDA graph can hold."""


class CudaGraph:
    """What only a device with graphs can do; a test puts another one in its place.

    Args:
        device: of everything.
        beside: a graph whose stream and memory this one shares: a backward pass with its forward pass, say, or one
            shape's with another's. What neither of two replays leaves behind for later may lie in the same place.
    """

    def __init__(self, device: torch.device, beside: CudaGraph | None = None) -> None:
        self.device = device
        self._stream: Any = None if beside is None else beside.stream
        self._pool: Any = None if beside is None else beside.pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._host: Tensor | None = None
        self._event: Any = None

    @staticmethod
    def exists(device: torch.device) -> bool:
        """Whether a device has graphs."""
        return device.type == "cuda"

    @property
    def stream(self) -> Any:
        """Where it is captured. A backward pass runs on the stream of its forward pass: both need the same one."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    @property
    def pool(self) -> Any:
        """Where its tensors lie."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Runs steps on the stream of the capture."""
        here, side = torch.cuda.current_stream(self.device), self.stream
        side.wait_stream(here)
        with torch.cuda.stream(side):
            run()
        here.wait_stream(side)

    def capture(self, run: Callable[[], None]) -> None:
        """Records what ``run`` would do; nothing of it is done."""
        self._graph = torch.cuda.CUDAGraph()
        # other threads, such as one that pins batches, may go on meanwhile
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(self._graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            run()

    def replay(self) -> None:
        """Does it.

        Raises:
            CaptureError: before anything was captured.
        """
        if self._graph is None:
            raise CaptureError("a CUDA graph is replayed before it was captured: call capture(run) first")
        self._graph.replay()

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        """Copies numbers to the host without waiting; what it returns waits for them."""
        if self._host is None or self._host.shape != values.shape:
            self._host, self._event = torch.empty(values.shape, dtype=values.dtype, pin_memory=True), torch.cuda.Event()
        host, event = self._host, self._event
        host.copy_(values, non_blocking=True)
        event.record(torch.cuda.current_stream(self.device))

        def arrived() -> list[float]:
            event.synchronize()
            numbers: list[float] = host.tolist()
            return numbers

        return arrived


def record(graph: CudaGraph, run: Callable[[], None], what: str, parts: str) -> None:
    """Captures ``run``, with an error in words.

    Args:
        graph: to be captured into.
        run: is called once.
        what: it is.
        parts: that may be to blame.

    Raises:
        CaptureError: says what to do.
    """
    try:
        graph.capture(run)
    except RuntimeError as error:
        raise CaptureError(
            f"{what} cannot be captured in a CUDA graph ({one_line(error)}): something in {parts} waits for the device "
            "or asks a generator; train without capture"
        ) from error
