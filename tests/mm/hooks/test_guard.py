"""The hooks against numbers that go wrong, in runs of MMEngine."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from revnets.mm.hooks.guard import DriftHook, FiniteHook  # noqa: E402
from revnets.reversible import AdditiveCoupling, RangeError, RevSequential  # noqa: E402
from revnets.training.guards.finite import NonFinite  # noqa: E402


class Toy(BaseModel):
    """A reversible backbone that breaks in some of its forward passes."""

    def __init__(self, how: str, bad: range) -> None:
        super().__init__()
        convs = [[nn.Conv2d(2, 2, 1) for _ in range(2)] for _ in range(2)]
        self.backbone = RevSequential([AdditiveCoupling(*pair) for pair in convs], exact=True)
        self.norm = nn.BatchNorm2d(4)
        self.how, self.bad, self.calls = how, bad, 0

    def forward(self, inputs: list[Tensor], mode: str = "tensor") -> Any:
        x = torch.stack(inputs)
        self.calls += 1
        if self.calls - 1 in self.bad:
            x = x * (1e9 if self.how == "range" else 1.0)
        x = self.norm(torch.cat(self.backbone(x), 1))
        if self.calls - 1 in self.bad:
            x = x * float("nan")
        return {"loss": x.square().mean() + x.mean()}


def collate(items: list[Tensor]) -> dict[str, Any]:
    return {"inputs": items}


class Stop(Hook):
    """As if by the keyboard."""

    priority = "LOWEST"

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter == 3:
            raise KeyboardInterrupt


def train(folder: Path, how: str, bad: range, *hooks: Any, accumulate: int = 1, interim: int = 0) -> Runner:
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(list(torch.randn(16, 4, 32, 32)), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    runner = Runner(
        model=Toy(how, bad),
        work_dir=str(folder),
        train_dataloader=loader,
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}, "accumulative_counts": accumulate},
        train_cfg={"type": "ResumableTrainLoop", "max_epochs": 1},
        default_hooks={"checkpoint": {"type": "WholeCheckpointHook", "interim": interim} if interim else None},
        resume=(folder / "last_checkpoint").exists(),
        custom_hooks=list(hooks),
        default_scope="mmengine",
        experiment_name=f"{folder.name}-{how}-{bad}",
    )
    runner.train()
    return runner


@pytest.mark.parametrize("how", ["nan", "range"])
def test_updates_are_left_out(tmp_path: Path, how: str) -> None:
    hook = FiniteHook(limit=4)
    runner = train(tmp_path, how, range(2, 4), hook)
    assert hook.guard is not None
    assert hook.guard.skipped == 2
    assert runner.iter == 8
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())
    assert "step" not in vars(runner.optim_wrapper)


def test_too_many_in_a_row_name_the_layer(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="3 updates in a row"):
        train(tmp_path, "nan", range(2, 99), FiniteHook(limit=3))
    with pytest.raises(NonFinite, match=r"op 0: \|output\| reaches .* beyond the range"):
        train(tmp_path, "range", range(2, 99), FiniteHook(limit=3))


def test_counters_go_on_after_a_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "nan", range(2, 4), FiniteHook(limit=3), Stop(), interim=1)
    with pytest.raises(NonFinite, match="3 updates in a row"):
        train(tmp_path, "nan", range(1), FiniteHook(limit=3), interim=1)
    hook = FiniteHook(limit=3)
    train(tmp_path, "nan", range(0), hook, interim=1)
    assert hook.guard is not None
    assert hook.guard.state_dict() == {"skipped": 2, "in_a_row": 0}


def test_without_the_hook_the_range_guard_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RangeError):
        train(tmp_path, "range", range(2, 4))


def test_drift_is_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook = DriftHook(every=4)
    train(tmp_path, "nan", range(0), hook)
    assert hook.monitor is not None
    assert hook.monitor.worst == 0  # exact
    assert not [record for record in caplog.records if record.levelno > logging.INFO and "rebuilt" in record.message]
