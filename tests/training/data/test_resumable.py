"""An epoch entered in the middle goes on as it would have."""

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from revnets.training.data.resumable import Items, SeededDataset, apart, resumable, seed_all


class Noisy:
    """Numbers with noise of all three generators."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> float:
        return index + random.random() + np.random.rand() + float(torch.rand(()))


def epoch(epoch: int, skip: int = 0, workers: int = 0, repeated: bool = False, **more: Any) -> list[list[float]]:
    sampler = RandomSampler(Noisy(), generator=torch.Generator().manual_seed(epoch))  # type: ignore[arg-type]
    loader: DataLoader = DataLoader(Noisy(), batch_size=2, sampler=sampler, num_workers=workers, **more)  # type: ignore[arg-type]
    loader, batches = resumable(loader)
    batches.seed, batches.epoch, batches.skip, batches.repeated = 3, epoch, skip, repeated
    return [batch.tolist() for batch in loader]


def test_skipped_batches_change_nothing() -> None:
    whole = epoch(0)
    assert len(whole) == 4
    assert epoch(0) == whole != epoch(1)
    for skip in range(5):
        assert epoch(0, skip) == whole[skip:]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loading_processes_change_nothing(method: str) -> None:
    assert epoch(0, 1, workers=2, multiprocessing_context=method) == epoch(0, 1)


OPEN = """
import torch
from revnets.training.data.resumable import resumable
loader, _ = resumable(torch.utils.data.DataLoader(range(64), num_workers=1, persistent_workers=True))
kept = {"batches": iter(loader)}
kept["itself"] = kept
next(kept["batches"])
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise ValueError('of the user')", 1)])
def test_the_process_ends_with_its_loading_processes(end: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", OPEN + end], capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert ("of the user" in done.stderr) == bool(code)
    assert "killed by signal" not in done.stderr


def test_images_that_come_several_times_differ() -> None:
    loader, batches = resumable(DataLoader(Noisy(), batch_size=2, sampler=[1, 1]))  # type: ignore[arg-type]
    alike = next(iter(loader)).tolist()
    assert alike[0] == alike[1]
    batches.repeated = True
    other = next(iter(loader)).tolist()
    assert other[0] != other[1]


def test_generators_are_put_back() -> None:
    seed_all(1, 2)
    with apart():
        seed_all(5)
        drawn = random.random(), np.random.rand(), float(torch.rand(()))
    after = random.random(), np.random.rand(), float(torch.rand(()))
    seed_all(1, 2)
    assert after == (random.random(), np.random.rand(), float(torch.rand(()))) != drawn


def test_reading_leaves_the_generators_of_the_training_alone() -> None:
    """What the model draws next must not depend on how many images were read in this process."""
    data = SeededDataset(Noisy())
    seed_all(1, 2)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    seed_all(1, 2)
    first = data[(3, (7, 8))]
    assert data.__getitems__([(3, (7, 8)), (3, (7, 9))])[0] == first != data[(3, (7, 9))]
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def test_batches_know_a_seed() -> None:
    loader, _ = resumable(DataLoader(Noisy(), batch_size=2, collate_fn=lambda batch: batch))  # type: ignore[arg-type]
    seeds = {batch.seed for batch in loader if isinstance(batch, Items)}
    assert len(seeds) == 4
