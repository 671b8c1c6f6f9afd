"""The hook in a run of MMEngine."""

from __future__ import annotations

import csv
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
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str) -> Any:
        return {"loss": torch.nn.functional.cross_entropy(self.net(x), y)}


def test_figures_of_a_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = list(zip(torch.randn(20, 3, 8, 8), torch.randint(0, 4, (20,)), strict=True))
    runner = Runner(
        model=Classifier(),
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=4),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        train_cfg={"by_epoch": True, "max_epochs": 1},
        custom_hooks=[{"type": "NumericsHook", "interval": 2}],
        default_scope="mmengine",
        experiment_name=tmp_path.name,
    )
    runner.train()
    with (tmp_path / "numerics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["layer"]) for r in rows] == [(str(i), f"net.{n}") for i in (0, 2, 4) for n in (0, 4)]
    assert all(float(r["output_grad_rms"]) > 0 for r in rows)
    assert (tmp_path / "numerics.png").exists()
    assert not any(m._forward_hooks for m in runner.model.modules())
