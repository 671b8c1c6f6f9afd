"""The resumable loop and the whole checkpoints, on a toy: same losses to the bit, nothing lost at any kill."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from mmengine.dataset import BaseDataset  # noqa: E402
from mmengine.evaluator import BaseMetric  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from revnets.mm import WholeCheckpointHook  # noqa: E402
from revnets.mm.hooks import checkpoint  # noqa: E402
from revnets.mm.hooks.checkpoint import WholeFilesBackend  # noqa: E402


class Noisy(BaseDataset):
    """Ten numbers, augmented by all three generators."""

    def load_data_list(self) -> list[dict[str, Any]]:
        return [{"value": float(index)} for index in range(10)]

    def prepare_data(self, idx: int) -> Any:
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return {"inputs": torch.tensor([self.get_data_info(idx)["value"] + noise])}


class Toy(BaseModel):
    """A line with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        out = self.drop(self.line(inputs)).square().mean()
        return {"loss": out} if mode == "loss" else [out]


class Score(BaseMetric):
    """A different one every time, best the second time."""

    scores = (0.1, 0.9, 0.5)

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        self.calls = getattr(self, "calls", 0) + 1
        return {"score": self.scores[(self.calls - 1) % 3]}


class Watch(Hook):
    """Notes losses; stops when told."""

    priority = "LOWEST"

    def __init__(self, losses: list[tuple[int, float]], stop: int | None) -> None:
        self.losses, self.stop = losses, stop

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append((runner.iter, float(outputs["loss"])))
        if runner.iter + 1 == self.stop:
            raise KeyboardInterrupt


def run(
    folder: Path,
    losses: list[tuple[int, float]],
    stop: int | None = None,
    workers: int = 0,
    batch: int = 3,
    accumulate: int = 1,
    **saving: Any,
) -> Runner:
    loader = {
        "batch_size": batch,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "dataset": Noisy(),
        "collate_fn": {"type": "default_collate"},
    }
    torch.manual_seed(5)
    runner = Runner(
        model=Toy(),
        work_dir=str(folder),
        train_dataloader=loader,
        val_dataloader={**loader, "sampler": {"type": "DefaultSampler", "shuffle": False}},
        val_evaluator=[Score()],
        val_cfg={},
        train_cfg={"type": "ResumableTrainLoop", "max_epochs": 3, "val_interval": 1},
        optim_wrapper={
            "optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9},
            "accumulative_counts": accumulate,
        },
        param_scheduler=[{"type": "ExponentialLR", "gamma": 0.9, "by_epoch": True}],
        default_hooks={"checkpoint": {"type": "WholeCheckpointHook", "interval": 1, "interim": 1, **saving}},
        custom_hooks=[Watch(losses, stop)],
        resume=(folder / "last_checkpoint").exists(),
        randomness={"seed": 5},
        log_level="ERROR",
        experiment_name=f"{folder.name}-{stop}-{len(losses)}",
    )
    if stop is None:
        runner.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    return runner


def scores(runner: Runner) -> list[float]:
    """What each validation of a run found."""
    return [float(score) for score in runner.message_hub.get_scalar("val/score")._log_history]


def test_notes_of_a_run_of_the_same_name_and_second_are_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scores(run(tmp_path / "whole", []))

    def before_run(hook: Watch, runner: Runner) -> None:
        runner.message_hub.update_info("validated_epoch", 1)

    monkeypatch.setattr(Watch, "before_run", before_run)
    assert scores(run(tmp_path / "other", [])) == expected


@pytest.mark.parametrize("stops", [(4,), (8,), (2, 5, 6, 11)])
def test_same_losses_as_without_interruption(tmp_path: Path, stops: tuple[int, ...]) -> None:
    whole: list[tuple[int, float]] = []
    parts: list[tuple[int, float]] = []
    expected = run(tmp_path / "whole", whole)
    for stop in stops:  # an epoch has four batches: within, at its end, within and again, ...
        run(tmp_path / "parts", parts, stop)
    found = run(tmp_path / "parts", parts)
    assert [index for index, _ in whole] == list(range(12))
    assert parts == whole
    for a, b in zip(expected.model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert expected.optim_wrapper.get_lr() == found.optim_wrapper.get_lr()
    for file in (tmp_path / "whole").glob("epoch_*.pth"):
        a, b = (torch.load(tmp_path / name / file.name, weights_only=False) for name in ("whole", "parts"))
        for key in ("iter", "epoch"):
            assert a["message_hub"]["runtime_info"][key] == b["message_hub"]["runtime_info"][key]


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_validation_that_was_prevented_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    begun: list[int] = []

    def begin(self: Watch, runner: Any) -> None:
        begun.append(runner.epoch)
        if begun == list(range(1, epoch + 1)):
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "before_val_epoch", begin)
    losses: list[tuple[int, float]] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, losses)
    run(tmp_path, losses)
    assert begun == [*range(1, epoch + 1), *range(epoch, 4)]
    assert [index for index, _ in losses] == list(range(12))


@pytest.mark.slow
def test_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    none: list[tuple[int, float]] = []
    two: list[tuple[int, float]] = []
    run(tmp_path / "none", none)
    run(tmp_path / "two", two, stop=6, workers=2)
    run(tmp_path / "two", two)
    assert none == two


def test_other_batches_than_when_saved_are_an_error(tmp_path: Path) -> None:
    run(tmp_path, [], stop=7)
    for batch in (2, 5):  # of whose epochs the second holds iteration 7, and not
        with pytest.raises(ValueError, match="cannot resume at iteration 7 in epoch 1"):
            run(tmp_path, [], batch=batch)


def test_only_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run(tmp_path, [], max_keep_ckpts=1, save_best="score", rule="greater")
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names == {"interim.pth", "epoch_3.pth", "best_score_epoch_2.pth"}
    assert Path((tmp_path / "last_checkpoint").read_text()) == tmp_path / "epoch_3.pth"
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_failed_write_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full from the second epoch's checkpoint on: the first one, and its name, stay."""
    put, count = WholeFilesBackend.put, 0

    def fails(self: WholeFilesBackend, obj: bytes, filepath: str) -> None:
        nonlocal count
        count += 1
        if count > 1:
            monkeypatch.setattr(checkpoint.os, "fsync", full)
        put(self, obj, filepath)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WholeFilesBackend, "put", fails)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, [], interim=0, max_keep_ckpts=1)
    names = {path.name for path in tmp_path.glob("*.pth")}
    last = Path((tmp_path / "last_checkpoint").read_text())
    assert names == {last.name} == {"epoch_1.pth"}
    torch.load(last, weights_only=False)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_options_are_those_of_mmengine() -> None:
    hook = WholeCheckpointHook(interval=2, save_best="score", rule="greater", interim=10)
    assert (hook.interval, hook.save_best, hook.interim) == (2, ["score"], 10)
