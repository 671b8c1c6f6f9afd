"""Data whose order and augmentation follow from seeds alone, so that an epoch can be entered anywhere.

What is drawn at random depends on the seed and on where in the run it is drawn, and on nothing that came before: a run
that starts there draws the same.
"""

import atexit
import functools
import multiprocessing
import multiprocessing.util  # its work at exit comes after ours, which is registered later
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..termination import leave_to_parent

MODEL, DATA, BATCH = 0, 1, 2  # streams of random numbers


def seed_all(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators from a tuple of numbers."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


@contextmanager
def apart() -> Iterator[None]:
    """Put the generators back as they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


class Batches:
    """A batch sampler that skips what is done and tells each image the seed of its augmentation.

    Args:
        batches: The batch sampler that chooses.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.seed, self.epoch, self.skip, self.rank = 0, 0, 0, 0
        self.repeated = False  # an image may come several times in an epoch, each time with another augmentation

    @property
    def sampler(self) -> Any:
        """Of images."""
        return self.batches.sampler

    @property
    def batch_size(self) -> int:
        """Images of a batch."""
        size: int = self.batches.batch_size
        return size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        for number, batch in enumerate(self.batches):
            if number >= self.skip:
                yield [(index, self._seed(index, number, place)) for place, index in enumerate(batch)]

    def _seed(self, index: int, batch: int, place: int) -> tuple[int, ...]:
        more = (self.rank, batch, place) if self.repeated else ()
        return (self.seed, DATA, self.epoch, index, *more)


class Items(list[Any]):
    """The items of a batch, and the seed of what is drawn for all of them."""

    seed: tuple[int, ...] = ()


class SeededDataset:
    """A data set whose items are read with random numbers of their own; all else is the data set's.

    Args:
        dataset: Indexable.
    """

    def __init__(self, dataset: Any) -> None:
        self.__dict__["_dataset"] = dataset

    def __getitem__(self, index: tuple[int, tuple[int, ...]]) -> Any:
        with apart():
            seed_all(*index[1])
            return self._dataset[index[0]]

    def __getitems__(self, indices: Sequence[tuple[int, tuple[int, ...]]]) -> Items:
        items = Items(self[index] for index in indices)
        items.seed = indices[0][1]
        return items

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)


class _Start:
    """Starts a loading process: what the loader asks for, and no death by SIGTERM."""

    def __init__(self, inner: Callable[[int], None] | None) -> None:
        self.inner = inner

    def __call__(self, worker: int) -> None:
        leave_to_parent(worker)
        if self.inner is not None:
            self.inner(worker)


@functools.cache
def _kill_workers_at_exit() -> None:
    """Loading processes ignore SIGTERM, by which Python ends those whose loader stays open: it would wait.

    Torch takes the death of one for an error, and would print it while Python ends.
    """

    def kill() -> None:
        children = [child for child in multiprocessing.active_children() if child.daemon]
        if children and hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in children:
            child.kill()

    atexit.register(kill)


def resumable(loader: DataLoader) -> tuple[DataLoader, Batches]:
    """The same loader, on seeded items and batches that can be skipped.

    Args:
        loader: Of a data set that can be indexed.

    Returns:
        The new loader, and its batch sampler: set its ``seed``, ``epoch`` and ``skip`` before each epoch.

    Example:
        >>> loader, batches = resumable(DataLoader(range(6), batch_size=2))
        >>> batches.skip = 1
        >>> [batch.tolist() for batch in loader]
        [[2, 3], [4, 5]]
    """
    batches = Batches(loader.batch_sampler)
    workers: dict[str, Any] = {}
    if loader.num_workers:
        _kill_workers_at_exit()
        workers = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
    made: DataLoader = DataLoader(
        SeededDataset(loader.dataset),  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=_Start(loader.worker_init_fn),
        multiprocessing_context=loader.multiprocessing_context,
        **workers,
    )
    return made, batches
