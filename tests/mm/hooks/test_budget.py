"""The hook in a run of MMEngine, and plans of detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine", reason="the hook needs MMEngine (pip install -e .[detection])")

import mmengine.model
from mmengine.runner import Runner

import revnets.mm  # noqa: F401  (registers the hook)


class Classifier(mmengine.model.BaseModel):
    """A network in MMEngine's clothes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_block(3 if k == 0 else 8) for k in range(4)))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, y: Any = None, mode: str = "tensor") -> Any:
        logits = self.head(self.blocks(x).mean((2, 3)))
        return logits if mode == "tensor" else {"loss": nn.functional.cross_entropy(logits, y)}


def _block(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 8, 1))


def _weights_after_a_run(folder: Path, *hooks: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    data = list(zip(torch.randn(16, 3, 32, 32), torch.randint(0, 4, (16,)), strict=True))
    runner = Runner(
        model=Classifier(),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=8),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        train_cfg={"by_epoch": True, "max_epochs": 1},
        custom_hooks=list(hooks),
        default_scope="mmengine",
        experiment_name=folder.name,
    )
    runner.train()
    return runner, runner.model.state_dict()


def test_a_run_within_a_budget_is_the_run_without(tmp_path: Path) -> None:
    _, plain = _weights_after_a_run(tmp_path / "plain")
    hook = {"type": "MemoryBudgetHook", "budget": "8MB", "input_size": (3, 32, 32)}
    runner, found = _weights_after_a_run(tmp_path / "small", hook)
    (used,) = [h for h in runner.hooks if type(h).__name__ == "MemoryBudgetHook"]
    assert used.plan.choices
    assert used.plan.peak_bytes <= 8_000_000 < used.plan.plain_bytes
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("hook", "said"),
    [({"budget": "1KB", "input_size": (3, 32, 32)}, "needs at least"), ({"budget": "1GB"}, "give input_size")],
    ids=["too small", "no size"],
)
def test_mistakes(hook: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        _weights_after_a_run(tmp_path, {"type": "MemoryBudgetHook", **hook})
    with pytest.raises(ValueError, match="budget 'a lot'"):
        _weights_after_a_run(tmp_path, {"type": "MemoryBudgetHook", "budget": "a lot"})


@pytest.mark.slow
def test_a_detector_trains_within_its_budget() -> None:
    pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    from revnets.profiling.bench.peers import compare, read_target, ways
    from revnets.profiling.target import Setting

    setting = Setting(optimizer=None)
    target = read_target("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py@128x160:1", setting, 1)
    rows = compare(target, setting, ways(target, setting, 3, compiled=False), repeats=1).rows
    plans = [row for row in rows if row.budget_bytes is not None]
    assert all(row.measured_bytes <= row.budget_bytes for row in plans)  # type: ignore[operator]
    assert plans[0].measured_bytes < rows[0].measured_bytes
