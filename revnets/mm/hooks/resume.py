"""Training that goes on after an interruption as if there had been none, in the middle of an epoch, too.

What is drawn at random depends on the seed and on where in the run it is drawn, and on nothing that came before: so a
run that starts there draws the same.
"""

import math
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_rank
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from ...reversible import RangeError
from ...training.checkpoints.reading import CheckpointError
from ...training.data.resumable import MODEL, resumable, seed_all
from ...training.processes import settle_buckets
from ...training.termination import Terminated, Termination

VALIDATED, BATCHES = "validated_epoch", "batches_of_an_epoch"  # in the message hub, and so in checkpoints


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """MMEngine's ``EpochBasedTrainLoop``, resumable at any iteration with the same losses.

    The order of the images is that of their sampler, of whose epoch the batches that are done are skipped, unread.
    Augmentations are seeded per epoch and image, by any number of worker processes alike; what the model draws
    (proposals, dropout), per iteration and process. A validation that an interruption prevented is made up for.

    Args:
        runner: MMEngine's.
        dataloader: a loader, or its config.
        max_epochs: to train for.
        **options: ``val_begin``, ``val_interval`` and ``dynamic_intervals`` as of ``EpochBasedTrainLoop``.

    Example:
        >>> train_cfg = dict(type="ResumableTrainLoop", max_epochs=12, val_interval=1)  # in a config
    """

    def __init__(self, runner: Any, dataloader: Any, max_epochs: int, **options: Any) -> None:
        super().__init__(runner, dataloader, max_epochs, **options)
        self.dataloader: DataLoader
        self.dataloader, self._batches = resumable(self.dataloader)
        self._termination = Termination()

    def run(self) -> torch.nn.Module:
        """Train, from where a resumed runner is."""
        seed = self.runner.seed  # a resumed run's: the sampler was built before it was known
        sampler = self._batches.sampler
        if getattr(sampler, "seed", None) is not None:
            sampler.seed = seed
        self._batches.seed = seed
        done = self.batches_done()
        settle_buckets(self.runner.model)
        self.runner.message_hub.update_info(BATCHES, len(self.dataloader))
        with self._termination:
            self.runner.call_hook("before_train")
            hub = self.runner.message_hub
            if self._iter == 0:  # MMEngine finds its notes by name and second: those of a run just before, too
                hub.runtime_info.pop(VALIDATED, None)
            if self._iter > 0:  # checkpoints say where the last iteration was, even if no other comes before them
                hub.update_info("iter", self._iter - 1)
            if self._epoch > 0 and done == 0:  # stopped between this epoch's end and its validation's
                hub.update_info("epoch", self._epoch - 1)
                self._validate()
            while self._epoch < self._max_epochs and not self.stop_training:
                self.run_epoch()
                self._validate()
            self.runner.call_hook("after_train")
        return self.runner.model

    def _validate(self) -> None:
        """If it is time, and not done before; noted first, for the hooks that save the best weights at its end."""
        self._decide_current_val_interval()
        due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        hub = self.runner.message_hub
        if self.runner.val_loop is None or self._epoch < self.val_begin or not due:
            return
        if hub.runtime_info.get(VALIDATED) != self._epoch:
            self.runner.call_hook("before_train_validation")
            self._stop_if_terminated(now=True)
            hub.update_info(VALIDATED, self._epoch)
            self.runner.val_loop.run()

    def end_validation_if_terminated(self) -> None:
        """After SIGTERM, end the run within a validation, before which it was saved.

        Raises:
            Terminated: in all processes.
        """
        if self._termination.agreed(get_device()):
            raise self._terminated()

    def _stop_if_terminated(self, now: bool = False) -> None:
        """After SIGTERM, have the checkpoint saved and end the run, between two updates of the weights.

        Raises:
            Terminated: in all processes.
        """
        if self._termination.agreed(get_device(), now):
            self.runner.call_hook("before_termination")
            raise self._terminated()

    def _terminated(self) -> Terminated:
        saved = self.runner.message_hub.runtime_info.get("last_ckpt")
        where = f"the run is saved in '{saved}', --resume goes on from there" if saved else "the run is not saved"
        return Terminated(f"SIGTERM at iteration {self._iter} (epoch {self._epoch}): {where}")

    def batches_done(self) -> int:
        """How many batches of the present epoch are done.

        Raises:
            CheckpointError: when an epoch had another number of batches before the run was resumed.
        """
        return self.batches_done_at(self._iter, self._epoch, self.runner.message_hub.runtime_info.get(BATCHES))

    def batches_done_at(self, iteration: int, epoch: int, before: int | None) -> int:
        """How many batches of an epoch are done at an iteration.

        Args:
            iteration: of the whole run.
            epoch: that it is in.
            before: batches that an epoch had when that was written, if it was.

        Raises:
            CheckpointError: when an epoch has another number of batches now.
        """
        done = iteration - epoch * len(self.dataloader)
        if before not in (None, len(self.dataloader)) or not 0 <= done <= len(self.dataloader):
            raise CheckpointError(
                f"cannot resume at iteration {iteration} in epoch {epoch}: an epoch now has "
                f"{len(self.dataloader)} batches, other than when the checkpoint was saved; use the same data, batch "
                "size and number of processes"
            )
        return done

    def run_epoch(self) -> None:
        """One epoch, or what is left of it."""
        done = self.batches_done()
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        self._batches.epoch, self._batches.skip = self._epoch, done
        for index, batch in enumerate(self.dataloader, start=done):
            seed_all(self.runner.seed, MODEL, get_rank(), self._iter)
            try:
                self.run_iter(index, batch)
            except RangeError as error:  # exact mode's guard, before any update
                self._failed(index, batch, error)
            if index + 1 < len(self.dataloader) and self.runner.optim_wrapper.should_update():
                self._stop_if_terminated()
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def _failed(self, index: int, batch: Any, error: RangeError) -> None:
        """An iteration without an update, if a hook takes it on (``FiniteHook``).

        Raises:
            RangeError: none does.
        """
        if not any(hasattr(hook, "after_failed_iter") for hook in self.runner.hooks):
            raise error
        self.runner.call_hook("after_failed_iter", error=error)
        self.runner.optim_wrapper._inner_count += 1
        outputs = {"loss": torch.tensor(math.nan)}
        self.runner.call_hook("after_train_iter", batch_idx=index, data_batch=batch, outputs=outputs)
        self._iter += 1
