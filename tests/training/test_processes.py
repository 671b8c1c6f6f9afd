"""What processes decide together and keep of their own, with two of them (gloo) and with one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revnets.training.processes import at_first, of_first, own_buffers, put_buffers, settle_buckets, several


def decide() -> str:
    if dist.get_rank():
        raise AssertionError("asked of another process than the first")
    return "last.pth.tar"


def refuse() -> str:
    raise ValueError("all checkpoints are damaged")


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found: dict[str, Any] = {"several": several(), "of_first": of_first(decide), "at_first": at_first(rank)}
        try:
            of_first(refuse)
        except ValueError as error:
            found["refused"] = str(error)
        net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2))
        net.register_buffer("mask", torch.tensor(True))
        net[1].running_mean.fill_(-0.0 if rank else 0.0)  # type: ignore[union-attr, operator]
        found["buffers"] = own_buffers(net)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for found in (first, second):
        assert found["several"]
        assert found["of_first"] == "last.pth.tar"
        assert found["refused"] == "all checkpoints are damaged"
    assert (first["at_first"], second["at_first"]) == ([0, 1], [])
    assert first["buffers"] == {}
    assert list(second["buffers"]) == ["1.running_mean"]  # to the bit: equality would not see it


def test_one_process() -> None:
    norm = nn.BatchNorm2d(2)
    assert not several()
    assert of_first(lambda: 1) == 1
    with pytest.raises(ValueError, match="damaged"):
        of_first(refuse)
    assert at_first(1) == []
    assert own_buffers(norm) == {}


def test_buffers_are_put_back_where_they_are_known() -> None:
    norm = nn.BatchNorm2d(2)
    put_buffers(norm, {"running_var": torch.full((2,), 3.0), "gone": torch.ones(1)})
    assert norm.running_var is not None
    assert norm.running_var.tolist() == [3, 3]
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0, 0]


def gradients(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    try:
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm1d(30), *(nn.Linear(size, size + 1) for size in range(30, 60)))
        x, order = torch.randn(5, 30, generator=torch.Generator().manual_seed(rank)), list[str]()
        settled, plain = DistributedDataParallel(net), DistributedDataParallel(copy.deepcopy(net))
        for name, parameter in net.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
        settle_buckets(settled)
        found: dict[str, Any] = {"order": list(order), "left": [p.grad for p in net.parameters()]}
        for key, model in (("settled", settled), ("plain", plain)):
            found[key] = []
            for _ in range(3):
                model.zero_grad()
                model(x).square().sum().backward()
                found[key].append([parameter.grad.clone() for parameter in model.parameters()])
            model.eval()(x)  # where DDP gives all processes the first's statistics, which each has changed since
            found[f"{key} mean"] = model.module[0].running_mean
        torch.save({**found, "names": [name for name, _ in net.named_parameters()]}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_the_first_step_of_three_processes_sums_as_the_others(tmp_path: Path) -> None:
    mp.spawn(gradients, (str(tmp_path),), nprocs=3)
    found, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (1, 2))
    for key in ("settled mean", "plain mean"):
        assert torch.equal(found[key], other[key]), key
    assert found["order"] == found["names"][::-1]
    assert found["left"] == [None] * len(found["names"])
    assert same(found["settled"][0], found["settled"][1])
    assert same(found["settled"][0], found["settled"][2])
    assert not same(found["plain"][0], found["plain"][1])  # why it is needed: should this fail, torch has mended it


def test_buckets_of_what_is_not_distributed() -> None:
    net = nn.Linear(2, 2)
    settle_buckets(net)
    assert net.weight.grad is None
