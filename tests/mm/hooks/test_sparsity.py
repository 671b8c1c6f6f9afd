"""The hook in runs of MMEngine: masks, averages, accumulation and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from revnets.layers import SparseConv2d
from revnets.sparsity import sparse_layers
from tests.sparsity.double import batch, network

pytest.importorskip("mmengine", reason="the hook needs MMEngine (pip install -e .[detection])")

import mmengine.model
from mmengine.runner import Runner

import revnets.mm  # noqa: F401  (registers the hook)


class Classifier(mmengine.model.BaseModel):
    """A sparse network in MMEngine's clothes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str) -> Any:
        return {"loss": torch.nn.functional.cross_entropy(self.net(x), y)}


class Pictures(mmengine.model.BaseModel):
    """A network that takes images as MMEngine's models usually do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), SparseConv2d(4, 8, 3, sparsity=0.5))

    def forward(self, inputs: torch.Tensor, mode: str = "tensor") -> Any:
        out = self.net(inputs)
        return {"loss": out.square().mean()} if mode == "loss" else out


def run(folder: Path, epochs: int, resume: bool = False, accumulate: int = 1, ema: Any = None, **more: Any) -> Runner:
    model = Classifier()
    x, y = batch(0, size=48)
    loader = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=8)
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=loader,
        optim_wrapper={
            "optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9},
            "accumulative_counts": accumulate,
        },
        train_cfg={"by_epoch": True, "max_epochs": 4},
        custom_hooks=[
            {"type": "SparsityHook", "schedule": "rigl", "interval": 3, **more},
            {"type": "EMAHook", "momentum": 0.1, **(ema or {})},
        ],
        resume=resume,
        default_scope="mmengine",
        experiment_name=f"{folder.name}{epochs}{resume}",
    )
    runner.train_loop._max_epochs = epochs  # a run that is stopped early: the schedule is that of the whole
    runner.train()
    return runner


def parts(runner: Runner) -> tuple[Any, Any]:
    hooks = {type(hook).__name__: hook for hook in runner.hooks}
    return hooks["SparsityHook"], hooks["EMAHook"]


def test_resumed_run_equals_uninterrupted_run_to_the_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 4, distribution="erk")
    run(tmp_path / "parts", 2, distribution="erk")
    second = run(tmp_path / "parts", 4, resume=True, distribution="erk")
    (ours, ema), (theirs, other) = parts(whole), parts(second)
    assert ours.controller.history == theirs.controller.history
    assert len(ours.controller.history) == 5  # of 24 steps up to 0.75
    for a, b in ((whole.model, second.model), (ema.ema_model, other.ema_model)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    saved = torch.load(tmp_path / "whole" / "epoch_4.pth", weights_only=False)
    assert {"sparsity", "ema_state_dict"} <= saved.keys()
    for mine, average in zip(sparse_layers(whole.model), sparse_layers(ema.ema_model), strict=True):
        assert torch.equal(mine.mask, average.mask)
        assert not mine.weight[~mine.mask].any()
    assert (Path(whole.log_dir) / "sparsity.csv").exists()
    assert (Path(whole.log_dir) / "sparsity.png").exists()


@pytest.mark.parametrize("buffers", [False, True])
def test_average_has_the_newest_masks(tmp_path: Path, buffers: bool) -> None:
    runner = run(tmp_path, 1, ema={"update_buffers": buffers})
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    hook, _ = parts(runner)
    assert sum(hook.controller.history[0].changed)
    masks = {name: value for name, value in saved["state_dict"].items() if name.endswith(".mask")}
    assert masks
    for name, mask in masks.items():
        assert torch.equal(mask, runner.model.state_dict()[name])  # the average is saved in the model's place
        assert not saved["state_dict"][name.removesuffix("mask") + "weight"][~mask].any()


@pytest.mark.parametrize(("accumulate", "steps"), [(2, 12), (5, 5), (7, 4)])
def test_accumulated_iterations_count_as_one(tmp_path: Path, accumulate: int, steps: int) -> None:
    """Of 24 iterations, also where the last update has fewer of them."""
    hook, _ = parts(run(tmp_path, 4, accumulate=accumulate))
    assert hook.controller.schedule.total_steps == steps
    assert hook.controller.steps == steps
    assert [update.step for update in hook.controller.history] == [step for step in (3, 6) if step < 0.75 * steps]


def test_flops_of_the_training(tmp_path: Path) -> None:
    runner = Runner(
        model=Pictures(),
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(
            [{"inputs": torch.randn(3, 8, 8)} for _ in range(12)], batch_size=2
        ),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": 2},
        train_cfg={"by_epoch": True, "max_epochs": 4},
        custom_hooks=[{"type": "SparsityHook", "schedule": "rigl", "interval": 4}],
        default_scope="mmengine",
        experiment_name=tmp_path.name,
    )
    runner.train()
    first, masked = 2 * 27 * 4 * 36, 2 * 36 * 8 * 16  # 6 x 6 and 4 x 4 pixels
    expected = 4 * (3 * 12 * (first + masked // 2) + 2 * masked // 2)  # 4 images, 12 steps, dense gradients in 2
    assert runner.message_hub.get_info("train_flops") == expected
    assert runner.message_hub.get_scalar("train/train_tflops").current() == pytest.approx(expected / 1e12)
    written = json.loads((Path(runner.log_dir) / "flops.json").read_text())
    assert written["training"]["rigl"]["flops"] == expected
    assert {path.name for path in Path(runner.log_dir).glob("flops.*")} == {"flops.csv", "flops.json", "flops.png"}


def test_schedule_that_ends_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="before they start"):
        run(tmp_path, 1, start=0.9)


def test_resumed_checkpoint_without_masks_schedule(tmp_path: Path) -> None:
    run(tmp_path, 1)
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    del saved["sparsity"]
    torch.save(saved, tmp_path / "epoch_1.pth")
    with pytest.raises(ValueError, match="says nothing of the schedule"):
        run(tmp_path, 2, resume=True)
