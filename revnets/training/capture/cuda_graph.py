"""A CUDA graph as a training step uses it: the only part that needs a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CudaGraph:
    """What only a device with graphs can do; a test puts another one in its place.

    Args:
        device: of everything.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._host: Tensor | None = None
        self._event: Any = None

    @staticmethod
    def exists(device: torch.device) -> bool:
        """Whether a device has graphs."""
        return device.type == "cuda"

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Runs steps on a stream of their own, as a capture will."""
        here, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            run()
        here.wait_stream(side)

    def capture(self, run: Callable[[], None]) -> None:
        """Records what ``run`` would do; nothing of it is done."""
        self._graph = torch.cuda.CUDAGraph()
        # other threads, such as one that pins batches, may go on meanwhile
        stream = torch.cuda.Stream(self.device)
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            run()

    def replay(self) -> None:
        """Does it."""
        assert self._graph is not None
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
