"""Two processes (gloo, CPU) agree on every mask, which are those of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from revnets.sparsity import SparsityController, sparse_layers

from .double import batch, network

WORLD, STEPS = 2, 12
SCHEDULES = ("set", "rigl")


def train(model: nn.Module, schedule: str, share: slice) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = SparsityController(model, optimizer, schedule, total_steps=20, interval=3)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        x, y = (t[share] for t in batch(step))
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        controller.step()
    assert len(controller.history) == 4
    assert sum(map(sum, (u.changed for u in controller.history))) > 0
    return [layer.mask for layer in sparse_layers(model)]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for schedule in SCHEDULES:
            model = network(seed=rank).double()  # other masks in each process, until they are wrapped
            masks = train(DistributedDataParallel(model), schedule, slice(rank, None, WORLD))
            torch.save(masks, Path(folder) / f"{schedule}{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_masks_are_the_same_in_both_processes_and_in_one(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD)
    for schedule in SCHEDULES:
        first, second = (torch.load(tmp_path / f"{schedule}{rank}.pt", weights_only=True) for rank in range(WORLD))
        assert all(map(torch.equal, first, second))
        assert all(map(torch.equal, first, train(network(seed=0).double(), schedule, slice(None))))
