"""What a validation and a step need to begin with: images, and memory for a batch of them."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from classification.networks import models
from classification.networks.models import check_batch_fits
from classification.run.loop import validate
from classification.run.recovery import OwnState, Position
from classification.runtime import Runtime
from revnets.training.errors import UserError

CPU = torch.device("cpu")
ALONE = Runtime(CPU, 0, 0, 1, None, torch.contiguous_format)


def test_no_image_to_validate_on() -> None:
    with pytest.raises(UserError, match=r"^--val-split: there was no image in it to validate on"):
        validate(nn.Linear(1, 2), DataLoader(range(0)), ALONE, "validate", 1 << 30)


def test_a_batch_that_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "physical_memory", lambda device: 8 * 3 * 4 * 4 * 4)
    check_batch_fits(8, (3, 4, 4), CPU)
    with pytest.raises(UserError, match=r"^--batch-size: 9 images of 3x4x4 take 0.0 GB, there are 0.0 GB of memory"):
        check_batch_fits(9, (3, 4, 4), CPU)
    monkeypatch.setattr(models, "physical_memory", lambda device: None)  # nobody knows
    check_batch_fits(1 << 40, (3, 4, 4), CPU)


@pytest.mark.parametrize(("before", "said"), [(0, False), (2, True)])
def test_another_number_of_processes_is_said(before: int, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    processes = [{"buffers": {}, "loss": [1.0, 2.0]}] * before
    begin = Position(1, 2, 3.0, 4.0)
    assert OwnState(ALONE, {"model": nn.BatchNorm1d(1)}).restore({"processes": processes}, begin) == begin
    assert ("is of 2 processes, now there are 1" in caplog.text) == said
