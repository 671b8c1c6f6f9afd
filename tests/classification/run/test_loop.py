"""The loop against a few lines of plain torch: accumulation, averages, skipped updates, means over images."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.utils import NativeScaler
from torch import Tensor, nn

from classification.images.data import TrainData
from classification.options import TrainOptions
from classification.run.loop import train_epoch, validate
from classification.run.recovery import Position, Recovery
from classification.run.training import Training
from classification.runtime import Runtime
from revnets.training.guards.drift import DriftMonitor
from revnets.training.guards.finite import FiniteGuard

RUNTIME = Runtime(torch.device("cpu"), 0, 0, 1, None, torch.contiguous_format)
Batch = tuple[Tensor, Tensor]


class Loader(list[Batch]):
    """Batches, with the data set that the loop asks for."""

    dataset: Any = ()


class Average:
    """Notes when it is updated."""

    def __init__(self) -> None:
        self.updates: list[int] = []

    def update(self, model: nn.Module, step: int) -> None:
        self.updates.append(step)


def batches(count: int, sizes: tuple[int, ...] = (4,)) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        size = sizes[i % len(sizes)]
        images = torch.randn(size, 3, 2, 2, generator=generator)
        found.append((images, torch.randint(3, (size,), generator=generator)))
    return found


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def training(model: nn.Module, data: list[Batch], every: int, **more: Any) -> Training:
    options = TrainOptions(grad_accum_steps=every, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    guard, recovery = FiniteGuard(model, limit=9), Recovery(RUNTIME, 0, True)
    guard.start()
    parts = {"scheduler": None, "scaler": None, "ema": Average(), **more}
    return Training(
        options=options,
        runtime=RUNTIME,
        model=model,
        optimizer=optimizer,
        loss=nn.CrossEntropyLoss(),
        data=TrainData(Loader(data), None),
        recovery=recovery,
        guard=guard,
        drift=DriftMonitor(model, 0),
        **parts,
    )


def plain(model: nn.Module, data: list[Batch], every: int) -> None:
    """The mean of the losses of each group of batches, the last of which may be smaller."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for start in range(0, len(data), every):
        group = data[start : start + every]
        optimizer.zero_grad()
        torch.stack([nn.functional.cross_entropy(model(x), y) for x, y in group]).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [4, 5])
def test_an_update_is_the_mean_of_its_batches(count: int, every: int, scaled: bool) -> None:
    """Also of the last ones of an epoch, where they are fewer."""
    model = network()
    expected = copy.deepcopy(model)
    run = training(model, batches(count), every, scaler=NativeScaler(device="cpu") if scaled else None)
    figures, end = train_epoch(run, Position(0))
    plain(expected, batches(count), every)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    updates = math.ceil(count / every)
    assert run.ema is not None
    assert run.ema.updates == list(range(1, updates + 1))
    assert run.updates_per_epoch == updates
    assert end.step == count
    assert end.loss_count == 4 * count
    assert "skipped" not in figures


@pytest.mark.parametrize(("count", "every"), [(5, 2), (4, 2), (7, 3), (3, 5)])
def test_updates_are_counted_alike_wherever_a_run_begins(count: int, every: int) -> None:
    run = training(network(), batches(count), every)
    done = 0
    for epoch in range(3):
        for step in range(count + 1):
            if step and (step % every == 0 or step == count):
                done += 1
                if step < count:
                    assert run.updates_before(Position(epoch, step)) == done
        assert run.updates_before(Position(epoch, count)) == done == run.updates_before(Position(epoch + 1))


@pytest.mark.parametrize("every", [1, 2])
def test_an_update_that_is_skipped_changes_nothing(every: int) -> None:
    data = batches(5)
    data[2][0][0, 0] = math.nan
    run = training(network(), data, every)
    figures, end = train_epoch(run, Position(0))
    assert figures["skipped"] == 1
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert math.isfinite(figures["loss"])  # of the batches that have one
    assert end.loss_count == 4 * 4
    assert run.ema is not None
    assert run.ema.updates == ([1, 2, 4, 5] if every == 1 else [1, 3])
    expected = network()
    good = [batch for i, batch in enumerate(batches(5)) if i not in ([2] if every == 1 else [2, 3])]
    plain(expected, good, every)
    for a, b in zip(run.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", [(4,), (5, 5, 1), (1, 8, 3)])
def test_validation_is_a_mean_over_images(sizes: tuple[int, ...]) -> None:
    """A last batch that is smaller counts by its images."""
    data, model = batches(3, sizes), nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    found = validate(model, Loader(data), RUNTIME, "here", 50)
    images, target = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        output = model(images)
    assert found["images"] == len(images)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(output, target)), rel=1e-5)
    best = output.topk(5, dim=1).indices == target[:, None]
    assert found["top1"] == pytest.approx(100 * float(best[:, 0].float().mean()))
    assert found["top5"] == pytest.approx(100 * float(best.any(1).float().mean()))


@pytest.mark.parametrize("where", ["device", "loader"])
def test_mixing_ends_with_its_epoch(where: str) -> None:
    for off, ends in ((0, None), (2, 2)):
        mixup: Any = SimpleNamespace(mixup_enabled=True)
        loader = SimpleNamespace(dataset=(), mixup_enabled=True)
        data = TrainData(loader, mixup if where == "device" else None)
        for epoch in range(4):
            data.start(epoch, 0, off, 0)
            enabled = mixup.mixup_enabled if where == "device" else loader.mixup_enabled
            assert enabled == (ends is None or epoch < ends)
