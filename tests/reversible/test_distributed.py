"""Two processes on halves of a batch train as one process on the whole (gloo, CPU)."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from revnets.models.revbifpn import RevBiFPN
from revnets.reversible import set_mode

WORLD = 2


def make_model(mode: str) -> RevBiFPN:
    torch.manual_seed(0)
    model = RevBiFPN(width=1 / 3, num_classes=5, extra_silos=0, stem_stride=2, exact=False).double()
    set_mode(model, mode)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=generator), torch.arange(8) % 5


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
    }


def worker(rank: int, folder: str, mode: str, norm: str, find_unused: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        model = make_model(mode)
        if norm == "eval":
            for module in model.train().modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        else:
            model = _synchronized(model)
        x, y = batch()
        ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
        step(ddp, x[rank::WORLD], y[rank::WORLD])
        torch.save(state(model), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


class GlooSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all processes; torch's own SyncBatchNorm has no CPU kernel."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        count = x.numel() // x.shape[1] * WORLD
        total = dist.nn.functional.all_reduce(x.sum((0, 2, 3)))
        mean = total / count
        centred = x - mean[:, None, None]
        var = dist.nn.functional.all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[operator]
            self.running_mean.lerp_(mean.detach(), self.momentum)  # type: ignore[union-attr, arg-type]
            unbiased = var.detach() * count / (count - 1)
            self.running_var.lerp_(unbiased, self.momentum)  # type: ignore[union-attr, arg-type]
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def _synchronized(model: RevBiFPN) -> RevBiFPN:

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                norm = GlooSyncBatchNorm(child.num_features, child.eps, child.momentum).double()
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model


@pytest.mark.parametrize(
    ("mode", "norm", "find_unused"),
    [
        ("reversible", "eval", False),
        ("reversible", "eval", True),
        ("reversible", "sync", False),
        ("reversible", "sync", True),
        pytest.param("checkpoint", "sync", False, marks=pytest.mark.slow),
        pytest.param("store", "sync", True, marks=pytest.mark.slow),
    ],
)
def test_ddp_equals_one_process(mode: str, norm: str, find_unused: bool, tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path), mode, norm, find_unused), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    model = make_model("store")
    if norm == "eval":
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    step(model, *batch())
    expected = state(copy.deepcopy(model)) | {"grads": {n: p.grad for n, p in model.named_parameters()}}
    largest = max(g.abs().max() for g in expected["grads"].values())
    for name, grad in expected["grads"].items():
        assert torch.equal(first["grads"][name], second["grads"][name]), name
        assert (first["grads"][name] - grad).abs().max() <= 1e-8 * max(grad.abs().max(), 1e-3 * largest), name
    for name, buffer in expected["buffers"].items():
        assert torch.allclose(first["buffers"][name], buffer, rtol=1e-9, atol=1e-12), name
