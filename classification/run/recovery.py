"""Where a run is within an epoch, saved now and then and after SIGTERM."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from revnets.training.errors import UserError
from revnets.training.processes import at_first, own_buffers, put_buffers
from revnets.training.termination import Terminated, Termination

from ..runtime import Runtime
from .checkpoints import RECOVERY, Saver
from .resuming import check_steps

_logger = logging.getLogger("classification")


@dataclasses.dataclass(frozen=True)
class Position:
    """How far an epoch is, between two updates of the weights."""

    epoch: int
    step: int = 0  # batches done
    loss_sum: float = 0.0  # over their images, of this process; in a file, of all
    loss_count: float = 0.0

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], steps: int) -> Position:
        """Where a checkpoint was written.

        Args:
            checkpoint: Read, see `read_run`.
            steps: Batches of an epoch.

        Raises:
            UserError: An epoch had another number of batches.
        """
        values = checkpoint.get("position")
        if values is None:
            return cls(checkpoint["epoch"] + 1)
        check_steps(checkpoint, steps)
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in fields})


class OwnState:
    """What each process has of its own: running statistics, also of the EMA, and its share of the epoch's mean loss.

    Args:
        runtime: Device and processes.
        networks: The model, not wrapped, and the running mean of its weights; see `State`.
    """

    def __init__(self, runtime: Runtime, networks: Mapping[str, nn.Module]) -> None:
        self._runtime, self._modules = runtime, networks

    def gather(self, here: Position) -> list[dict[str, Any]]:
        """What differs from the first process, of each, for the process that writes; all must call it."""
        buffers = {name: own_buffers(module) for name, module in self._modules.items()}
        return at_first({"buffers": buffers, "loss": [here.loss_sum, here.loss_count]})

    def restore(self, checkpoint: Mapping[str, Any], begin: Position) -> Position:
        """Puts this process back; where the number of processes is another, all begin as the first was.

        Args:
            checkpoint: Of which model and EMA are loaded; the model is wrapped by now, as DDP spreads the first's.
            begin: Where it was written, with the losses of all.

        Returns:
            The same, with the losses of this process.
        """
        runtime, everyone = self._runtime, checkpoint.get("processes", [])
        before = len(everyone) or 1
        if before != runtime.world_size and runtime.primary:
            _logger.warning(
                f"--resume: the checkpoint is of {before} processes, now there are {runtime.world_size}: all begin as "
                "the first was, and an update is of another number of images"
            )
        if not runtime.distributed or len(everyone) != runtime.world_size:
            return begin if runtime.primary else dataclasses.replace(begin, loss_sum=0.0, loss_count=0.0)
        own = everyone[runtime.rank]
        for name, module in self._modules.items():
            put_buffers(module, own["buffers"].get(name, {}))
        loss_sum, loss_count = own["loss"] if begin.step else (0.0, 0.0)
        return dataclasses.replace(begin, loss_sum=loss_sum, loss_count=loss_count)


class Recovery:
    """Saves a run in the middle of an epoch: every so many batches, and to end it after SIGTERM.

    Args:
        runtime: Device and processes.
        every: Batches between two files; 0: only after SIGTERM.
        possible: Whether the data can be entered in the middle.
    """

    def __init__(self, runtime: Runtime, every: int, possible: bool) -> None:
        if every and not possible:
            raise UserError(
                "--recovery-interval: this data set can only be read from its start; leave it out, whole epochs are "
                "saved."
            )
        self.termination = Termination()
        self.saver: Saver | None = None  # of the process that writes
        self.own: OwnState | None = None  # known once the model is wrapped
        self._runtime, self._every, self._possible = runtime, every, possible
        self._since = 0

    def check(self, position: Callable[[], Position], steps: int, batches: int = 0) -> None:
        """Saves if it is time.

        Args:
            position: Gives where the run is, in this process.
            steps: Batches of an epoch.
            batches: Done since the last call.

        Raises:
            Terminated: After SIGTERM, in all processes.
        """
        self._since += batches
        ending = self.termination.agreed(self._runtime.device)
        if not ending and not (self._every and self._since >= self._every):
            return
        here = position()
        if self._possible:
            self._since = 0
            loss_sum, count = self._runtime.sum(here.loss_sum, here.loss_count)
            processes = self.own.gather(here) if self.own is not None else []
            if self.saver is not None:
                everywhere = dataclasses.replace(here, loss_sum=loss_sum, loss_count=count)
                self.saver.save_position({**dataclasses.asdict(everywhere), "steps": steps}, processes)
        if ending:
            where = f"batch {here.step} of {steps} of epoch {here.epoch}"
            saved = f"saved in {RECOVERY}" if self._possible else "its epoch is not saved, such data start at the front"
            raise Terminated(f"SIGTERM at {where}: {saved}; --resume auto goes on")
