"""A small run with everything that a checkpoint may hold, and odd values to put into it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn

from classification.run.checkpoints import Saver
from classification.run.recovery import Position
from classification.run.resuming import resume
from classification.run.state import State
from revnets.layers.sparse_ift.sparse import SparseLinear
from revnets.sparsity import SparsityController
from revnets.training.guards.finite import FiniteGuard

STEPS = 5


class Run:
    """Model, optimizer, plateau schedule, average, scaler, masks and guard, after two updates, in a folder."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), SparseLinear(4, 4, sparsity=0.5))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.ema = ModelEmaV3(self.model)
        self.scheduler = PlateauLRScheduler(self.optimizer)
        self.scaler = NativeScaler("cpu")
        self.scaler._scaler.scale(torch.ones(()))
        self.sparsity = SparsityController(self.model, self.optimizer, "set", total_steps=100, interval=1)
        self.guard = FiniteGuard(self.model)
        self.state = State(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            ema=self.ema,
            sparsity=self.sparsity,
            guard=self.guard,
        )
        args = {"model": "net", "mean": None, "img_size": 32}
        self.saver = Saver(self.state, args, folder, decreasing=False, max_history=2)
        for _ in range(2):
            self.step()

    def step(self) -> None:
        """One update."""
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 3)).square().sum().backward()
        self.optimizer.step()
        self.sparsity.step()
        self.ema.update(self.model)

    def save(self, position: bool) -> Path:
        """A file of after an epoch, or of the middle of one; each process has a running mean of its own."""
        own = {"buffers": {"model": {"1.running_mean": torch.ones(4)}, "ema": {}}, "loss": [1.0, 2.0]}
        if position:
            where = {"epoch": 1, "step": 3, "loss_sum": 1.0, "loss_count": 2.0, "steps": STEPS}
            self.saver.save_position(where, [own, own])
            return self.folder / "recovery.pth.tar"
        self.saver.save_checkpoint(0, 50.0, [own, own])
        return self.folder / "last.pth.tar"

    def resume(self, path: Path) -> dict[str, Any]:
        """As train.py does."""
        return resume(path, "net", self.state, STEPS)

    def go_on(self, checkpoint: dict[str, Any]) -> None:
        """What follows on a resumption; it must not fail."""
        begin = Position.of(checkpoint, STEPS)
        assert 0 <= begin.epoch <= 1_000_001
        self.scheduler.step(begin.epoch, 50.0)
        self.step()
        assert all(bool(p.isfinite().all()) for p in self.model.parameters())
        self.optimizer.state_dict()

    def fingerprint(self) -> str:
        """Of all that resuming changes, and of the folder."""
        scheduler = {k: v for k, v in self.scheduler.state_dict().items() if isinstance(v, (int, float, str))}
        state = [
            self.model.state_dict(),
            self.optimizer.state_dict(),
            self.ema.state_dict(),
            scheduler,
            self.scaler.state_dict(),
            self.sparsity.state_dict(),
            self.guard.state_dict(),
        ]
        content = io.BytesIO()
        torch.save(state, content)
        files = [(p.name, p.read_bytes()) for p in sorted(self.folder.iterdir())]
        digest = hashlib.sha256(content.getvalue())
        for name, data in files:
            digest.update(name.encode() + data)
        return digest.hexdigest()
