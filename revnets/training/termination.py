"""SIGTERM: the cluster wants the machine back. The run saves where it is and ends with a code of its own."""

import signal
import threading
from types import FrameType
from typing import Any

import torch

TERMINATED = 75  # sysexits' EX_TEMPFAIL, try again later; a shell says 143 of any process that dies of SIGTERM
TOGETHER = 8  # steps between two times that several processes ask each other


class Terminated(SystemExit):
    """Ends a run that was told to, after it has saved; uncaught, it ends the process with code 75.

    Args:
        message: What was saved, and how to go on.
    """

    def __init__(self, message: str) -> None:
        super().__init__(TERMINATED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Termination:
    """Notes SIGTERM instead of dying of it, as long as the ``with`` block lasts.

    However many come: Slurm and torchrun each send one. Outside of the main thread, where Python allows no handlers,
    nothing is noted.

    Example:
        >>> with Termination() as termination:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     termination.requested
        True
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._steps = 0

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def agreed(self, device: torch.device | str = "cpu", now: bool = False) -> bool:
        """Whether to end after this step: in several processes, all or none of them.

        Every process must call it equally often. They ask each other every few steps only, since a GPU waits for it.

        Args:
            device: Where the process group's backend works.
            now: Ask at once.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.requested
        self._steps += 1
        if not now and self._steps % TOGETHER:
            return False
        votes = torch.tensor(float(self.requested), device=device)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
        return bool(votes.item())


def leave_to_parent(worker: int = 0) -> None:
    """Has a process that loads data ignore SIGTERM: who sends it to all would take the data from a step not yet saved.

    Workers end with the process that started them.

    Args:
        worker: Its number, as torch's ``worker_init_fn`` gets it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
