"""What processes decide together and keep of their own, with two of them (gloo) and with one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from revnets.training.processes import at_first, of_first, own_buffers, put_buffers, several


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
