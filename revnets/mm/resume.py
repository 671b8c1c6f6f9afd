"""Training that goes on after an interruption as if there had been none, in the middle of an epoch, too.

What is drawn at random depends on the seed and on where in the run it is drawn, and on nothing that came before: so a
run that starts there draws the same.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

MODEL, DATA = 0, 1  # two streams of random numbers
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
        plain: DataLoader = self.dataloader
        self._batches = _Batches(plain.batch_sampler)
        self.dataloader: DataLoader = _with(plain, _Seeded(plain.dataset), self._batches)

    def run(self) -> torch.nn.Module:
        """Train, from where a resumed runner is."""
        seed = self.runner.seed  # a resumed run's: the sampler was built before it was known
        sampler = self._batches.sampler
        if getattr(sampler, "seed", None) is not None:
            sampler.seed = seed
        self._batches.seed = seed
        done = self.batches_done()
        self.runner.message_hub.update_info(BATCHES, len(self.dataloader))
        self.runner.call_hook("before_train")
        if self._epoch > 0 and done == 0:  # stopped between this epoch's end and its validation's
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
            hub.update_info(VALIDATED, self._epoch)
            self.runner.val_loop.run()

    def batches_done(self) -> int:
        """How many batches of the present epoch are done.

        Raises:
            ValueError: when an epoch had another number of batches before the run was resumed.
        """
        done = self._iter - self._epoch * len(self.dataloader)
        before = self.runner.message_hub.runtime_info.get(BATCHES, len(self.dataloader))
        if before != len(self.dataloader) or not 0 <= done <= before:
            raise ValueError(
                f"cannot resume at iteration {self._iter} in epoch {self._epoch}: an epoch now has "
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
            _seed_all(self.runner.seed, MODEL, get_rank(), self._iter)
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class _Batches:
    """A batch sampler that skips what is done and tells each image the seed of its augmentation."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.seed, self.epoch, self.skip = 0, 0, 0

    @property
    def sampler(self) -> Any:
        return self.batches.sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        for number, batch in enumerate(self.batches):
            if number >= self.skip:
                yield [(index, (self.seed, DATA, self.epoch, index)) for index in batch]


class _Seeded:
    """A data set whose items are read with random numbers of their own; all else is the data set's."""

    def __init__(self, dataset: Any) -> None:
        self.__dict__["_dataset"] = dataset

    def __getitem__(self, index: tuple[int, tuple[int, ...]]) -> Any:
        with _apart():
            _seed_all(*index[1])
            return self._dataset[index[0]]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)


def _with(loader: DataLoader, dataset: Any, batches: Any) -> DataLoader:
    """The same loader on another data set and batch sampler."""
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        **workers,
    )


def _seed_all(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators from a tuple of numbers."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


@contextmanager
def _apart() -> Iterator[None]:
    """Put the generators back as they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
