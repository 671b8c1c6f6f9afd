"""One of two processes (gloo, DDP) leaves exact mode's range: both leave the step out, and go on together."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from revnets.reversible import AdditiveCoupling, RangeError, RevSequential
from revnets.training.guards.finite import FiniteGuard
from revnets.training.guards.ranges import AgreedRangeError, ranges_agreed

BAD = {2: 1, 3: 0, 5: 1}  # step: process


class Net(nn.Module):
    """An exact chain within and another after it."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(2, 2), Chain(1), nn.Linear(2, 2))
        self.first = RevSequential([AdditiveCoupling(inner, nn.Linear(2, 2))], exact=True)
        self.norm, self.second = nn.BatchNorm1d(4), Chain(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(torch.cat(self.first(x), 1))).square().mean()


class Chain(nn.Module):
    """One exact op."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.chain = RevSequential([AdditiveCoupling(nn.Linear(half, half), nn.Linear(half, half))], exact=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.chain(x), 1)


def make(mode: str) -> Net:
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, RevSequential):
            module.mode = mode
    return net


def train(mode: str, rank: int, bad: dict[int, int]) -> tuple[dict[str, Any], list[str]]:
    net, words = make(mode), []
    model, guard = DistributedDataParallel(net, broadcast_buffers=False), FiniteGuard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    guard.start()
    for step in range(7):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        if step in BAD and not bad:
            continue
        try:
            with ranges_agreed():
                loss = model(x * (1e9 if bad.get(step) == rank else 1))
            guard.note(loss)
            loss.backward()
            if guard.good():
                optimizer.step()
        except AgreedRangeError as error:
            guard.failed(str(error))
            words.append(str(error))
        optimizer.zero_grad()
    counted = {name: value for name, value in net.state_dict().items() if "tracked" not in name}
    return counted, words


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for mode in ("reversible", "checkpoint", "store"):
        found, words = train(mode, rank, BAD)
        expected, none = train(mode, rank, {})
        assert none == []
        assert [each.split(":")[0] for each in words] == ["process 1", "process 0", "process 1"]
        assert all("beyond the range" in each for each in words)
        assert all(torch.equal(found[name], expected[name]) for name in expected), mode
    dist.destroy_process_group()


@pytest.mark.slow
def test_both_leave_the_step_out(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)


def test_one_process_raises_at_once() -> None:
    net = make("reversible")
    with pytest.raises(RangeError, match="op 0") as raised, ranges_agreed():
        net(torch.full((3, 4), 1e9))
    assert not isinstance(raised.value, AgreedRangeError)
