"""Two and three processes of MMEngine's runner (gloo) that are stopped and go on: each gets its own statistics back."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from revnets.mm.hooks.guard import DriftHook, FiniteHook  # noqa: E402

from .hooks import test_guard as guarded  # noqa: E402

WRAPPER = {"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}}


class Toy(BaseModel):
    """Lines, the last one made first, and their statistics, which DDP leaves to each process."""

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.norm = (
            nn.ModuleList(nn.Linear(size - 1, size) for size in range(30, 20, -1)),
            nn.BatchNorm1d(30),
        )

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        for line in reversed(self.lines):
            inputs = line(inputs).tanh()
        return {"loss": self.norm(inputs).abs().mean()}


class Stop(Hook):
    """As if by the keyboard, in all processes."""

    priority = "LOWEST"

    def __init__(self, after: int) -> None:
        self.after = after

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == self.after:
            raise KeyboardInterrupt


def collate(items: list[Tensor]) -> dict[str, Tensor]:
    return {"inputs": torch.stack(items)}


def run(folder: Path, stop: int = 0) -> dict[str, Any]:
    torch.manual_seed(0)
    ema = {"type": "EMAHook", "momentum": 0.1, "update_buffers": True}
    runner = Runner(
        model=Toy(),
        work_dir=str(folder),
        train_dataloader={
            "batch_size": 4,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "dataset": list(torch.randn(32, 20)),
            "collate_fn": collate,
        },
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.5, "momentum": 0.9}},
        train_cfg={"type": "ResumableTrainLoop", "max_epochs": 2},
        default_hooks={"checkpoint": {"type": "WholeCheckpointHook", "interval": 1, "interim": 1}},
        custom_hooks=[ema, Stop(stop)],
        launcher="pytorch",
        resume=(folder / "last_checkpoint").exists(),
        randomness={"seed": 5},
        log_level="ERROR",
        experiment_name=f"{folder.name}-{stop}",
        cfg=WRAPPER,
    )
    if stop:
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    else:
        runner.train()
    mean = next(hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model"))
    return {"model": runner.model.module.state_dict(), "ema": mean.state_dict()}


def out_of_range(folder: Path, rank: int) -> dict[str, Any]:
    """The second process leaves exact mode's range in two of eight iterations; drift is looked at by the first."""
    torch.manual_seed(0)
    hook = FiniteHook(limit=3)
    runner = Runner(
        model=guarded.Toy("range", range(2, 4) if rank else range(0)),
        work_dir=str(folder),
        train_dataloader={
            "batch_size": 2,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "dataset": list(torch.randn(32, 4, 32, 32)),
            "collate_fn": guarded.collate,
        },
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
        train_cfg={"type": "ResumableTrainLoop", "max_epochs": 1},
        default_hooks={"checkpoint": None},
        custom_hooks=[hook, DriftHook(every=1)],
        launcher="pytorch",
        log_level="ERROR",
        experiment_name=f"range-{rank}",
        cfg=WRAPPER,
    )
    runner.train()
    assert hook.guard is not None
    return {"weights": dict(runner.model.module.named_parameters()), **hook.guard.state_dict(), "iter": runner.iter}


def work(rank: int, folder: str, processes: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    found = {"whole": run(Path(folder, "whole"))}
    for stop in (2, 5):
        run(Path(folder, "parts"), stop)
    found["parts"] = run(Path(folder, "parts"))
    if processes == 2:
        found["range"] = out_of_range(Path(folder, "range"), rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def found_by(processes: int, folder: Path) -> list[dict[str, Any]]:
    mp.spawn(work, (str(folder), processes), nprocs=processes)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
    for own in found:
        for part in ("model", "ema"):
            for name, value in own["whole"][part].items():
                assert torch.equal(value, own["parts"][part][name]), (part, name)
    first, second, *_ = (own["whole"]["ema"]["module.norm.running_mean"] for own in found)
    assert not torch.equal(first, second)
    return found


@pytest.mark.slow
def test_a_resumed_run_is_the_same_in_every_process_and_all_leave_out_an_update_or_none(tmp_path: Path) -> None:
    first, second = (own["range"] for own in found_by(2, tmp_path))
    assert (first["skipped"], first["in_a_row"], first["iter"]) == (2, 0, 8)
    assert first.keys() == second.keys()
    assert (second["skipped"], second["in_a_row"]) == (2, 0)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


@pytest.mark.slow
def test_three_processes_round_alike_after_a_resume(tmp_path: Path) -> None:
    """DDP's groups of gradients: see ``settle_buckets``."""
    found_by(3, tmp_path)
