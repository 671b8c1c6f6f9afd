"""A small run with everything that a checkpoint may hold, and odd values to put into it."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn

from classification.checkpoints import Saver
from classification.recovery import Position
from classification.resuming import resume
from revnets.layers.sparse import SparseLinear
from revnets.sparsity import SparsityController
from revnets.training.finite import FiniteGuard

STEPS = 5
Path_ = tuple[Any, ...]


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
        self.saver = Saver(
            self.model,
            self.optimizer,
            {"model": "net", "mean": None, "img_size": 32},
            self.scheduler,
            self.ema,
            self.scaler,
            self.sparsity,
            folder,
            False,
            2,
            self.guard,
        )
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
        parts = (self.optimizer, self.scheduler, self.ema, self.scaler, self.sparsity, self.guard)
        return resume(path, "net", self.model, *parts, steps=STEPS)

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


def paths(tree: Any, here: Path_ = ()) -> list[Path_]:
    """Where something is in a tree."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    found = [(*here, key) for key, _ in entries]
    return found + [path for key, value in entries_of(tree) for path in paths(value, (*here, key))]


def entries_of(tree: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a container; nothing of all else."""
    if isinstance(tree, dict):
        return list(tree.items())
    return list(enumerate(tree)) if isinstance(tree, (list, tuple)) else []


DELETE = object()


def changed(tree: Any, path: Path_, value: Any) -> Any:
    """A copy of the containers, with another value at a path or none (DELETE); as it was where it has no such path."""
    if not path:
        return tree if value is DELETE else value
    key, *rest = path
    if isinstance(tree, dict) and key in tree:
        copy: Any = dict(tree)
    elif isinstance(tree, (list, tuple)) and isinstance(key, int) and key < len(tree):
        copy = list(tree)
    else:
        return tree
    if value is DELETE and not rest:
        del copy[key]
    else:
        copy[key] = changed(copy[key], tuple(rest), value)
    return copy


def write(tree: Any, path: Path) -> None:
    """A file of torch's; its writer, other than its reader, calls itself for what is nested."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(30000)
    try:
        torch.save(tree, path)
    finally:
        sys.setrecursionlimit(limit)


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list[Any]:
    """A list that holds itself."""
    value: list[Any] = [1]
    value.append(value)
    return value


def doubled() -> list[Any]:
    """A small file of 2^60 entries."""
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    return value


ODD: dict[str, Any] = {
    "text": "a",
    "no text": "",
    "minus one": -1,
    "zero": 0,
    "half": 0.5,
    "huge": 2**70,
    "very huge": -(10**400),
    "NaN": float("nan"),
    "infinity": float("inf"),
    "true": True,
    "nothing": None,
    "empty list": [],
    "list": [1, 2],
    "list of text": ["a"],
    "tuple": (0.5,),
    "empty mapping": {},
    "mapping": {"a": 1},
    "numbers as keys": {1: 2, None: 3},
    "bytes": bytearray(b"a"),
    "number in a tensor": torch.tensor(3.0),
    "NaN in a tensor": torch.full((4, 3), float("nan")),
    "tensor": torch.ones(4),
    "empty tensor": torch.zeros(0, 7),
    "whole numbers": torch.ones(4, 3, dtype=torch.int64),
    "flags": torch.ones(4, dtype=torch.bool),
    "complex": torch.ones(4, 3, dtype=torch.complex64),
    "on meta": torch.ones(4, 3, device="meta"),
    "expanded": torch.ones(1).expand(10**12),
    "sparse": torch.eye(4).to_sparse(),
    "deep": nested(300),
    "itself": itself(),
    "doubled": doubled(),
}
