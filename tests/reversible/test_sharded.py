"""Two and four processes: every mode and layer kind under DDP, uneven batches, and FSDP2 around a whole stack."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revnets import convert
from revnets.layers import list_layers
from revnets.reversible import MODES, RevSequential, set_mode

from .graphs import build

pytestmark = pytest.mark.slow
SIZES = {2: (3, 2), 4: (2, 1, 2, 1)}  # the last batch of an epoch is uneven


class Net(nn.Module):
    """A reversible stack of two scales and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = build([1, 2, 2], ["batch_norm", "conv"], exact=True)
        self.classifier = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.stack(x)[1].mean((2, 3)))
        return logits


def kinds() -> Iterator[tuple[str, str]]:
    for mode in MODES:
        yield mode, ""
    for name in list_layers():
        spec = name
        for text in (name, f"{name}:0.5"):
            try:
                convert(Net(), text, input_size=(3, 16, 16))
            except ValueError:
                continue
            spec = text
            break
        yield "reversible", spec


def network(mode: str, spec: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = Net()
    if spec:
        net = convert(net, spec, input_size=(3, 16, 16)).model
    if any(isinstance(module, RevSequential) for module in net.modules()):
        set_mode(net, mode)
    return net


def shares(world: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SIZES[world]), 3, 16, 16, generator=generator)
    return list(zip(x.split(SIZES[world]), (torch.arange(len(x)) % 5).split(SIZES[world]), strict=True))


def loss(net: nn.Module, share: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(share[0]), share[1])


def grads(net: nn.Module) -> dict[str, Tensor | None]:
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}


def ddp_worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        found: dict[str, Any] = {}
        for mode, spec in kinds():
            net = DistributedDataParallel(network(mode, spec), find_unused_parameters=True)
            loss(net, shares(world)[rank]).backward()
            found[f"{mode} {spec}"] = grads(net)
        net = DistributedDataParallel(network("reversible", ""))
        with net.join():  # one process has another batch
            for _ in range(3 if rank == 0 else 2):
                net.zero_grad()
                loss(net, shares(world)[rank]).backward()
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_every_mode_and_layer_under_ddp(world: int, tmp_path: Path) -> None:
    mp.spawn(ddp_worker, args=(world, str(tmp_path)), nprocs=world)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    cases = list(kinds())
    assert {spec.split(":")[0] for _, spec in cases} >= set(list_layers())
    for mode, spec in cases:
        expected: dict[str, Tensor] = {}
        for share in shares(world):
            net = network(mode, spec)
            loss(net, share).backward()
            for name, grad in grads(net).items():
                if grad is not None:
                    expected[name] = expected.get(name, torch.zeros_like(grad)) + grad / world
        scale = max(float(grad.abs().max()) for grad in expected.values())
        for name, grad in expected.items():
            mine = [each[f"{mode} {spec}"][name] for each in found]
            assert all(torch.equal(mine[0], other) for other in mine[1:]), (mode, spec, name)
            assert float((mine[0] - grad).abs().max()) <= 1e-5 * scale, (mode, spec, name)


def fsdp_worker(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        found: dict[str, Any] = {}
        for mode in MODES:
            net = network(mode, "")
            mesh = init_device_mesh("cpu", (world,))
            fully_shard(net.stack, mesh=mesh)  # the whole stack, never its ops: they are run again in the backward pass
            fully_shard(net, mesh=mesh)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                loss(net, shares(world)[rank]).backward()
                optimizer.step()
            found[mode] = {name: p.full_tensor().detach() for name, p in net.named_parameters()}  # type: ignore[attr-defined]
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_fsdp_around_a_stack_equals_one_process(tmp_path: Path) -> None:
    world = 2
    mp.spawn(fsdp_worker, args=(world, str(tmp_path)), nprocs=world)
    found = torch.load(tmp_path / "0.pt", weights_only=True)
    for mode in MODES:
        net = network(mode, "")
        nets = [copy.deepcopy(net) for _ in range(world)]  # each with its own statistics
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            for each, share in zip(nets, shares(world), strict=True):
                each.load_state_dict({**each.state_dict(), **dict(net.named_parameters())})
                each.zero_grad()
                loss(each, share).backward()
                for p, q in zip(net.parameters(), each.parameters(), strict=True):
                    if q.grad is not None:
                        p.grad = q.grad / world + (0 if p.grad is None else p.grad)
            optimizer.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(found[mode][name], p.detach(), rtol=1e-5, atol=1e-6, msg=f"{mode} {name}")
