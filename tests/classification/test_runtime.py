"""Processes: what they share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from classification.runtime import Runtime


@pytest.mark.parametrize("world_size", [2, 3, 5, 7, 48, 1000])
def test_statistics_shared_twice_are_the_same_bits(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run that is stopped in a validation and resumed: all processes have equal statistics then."""
    runtime = Runtime(torch.device("cpu"), 0, 0, world_size, None, torch.contiguous_format)
    module = nn.Sequential(nn.BatchNorm2d(4096), nn.BatchNorm2d(3))
    for norm in module:
        norm.running_mean.normal_()
        norm.running_var.normal_().exp_()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def from_equals(total: Tensor) -> None:
        total.copy_(sum(total.clone() for _ in range(world_size - 1)) + total)

    monkeypatch.setattr(torch.distributed, "all_reduce", from_equals)
    runtime.share_statistics(module, "reduce")
    for name, buffer in module.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize(("how", "mean"), [("reduce", 2.0), ("broadcast", 4.0), ("none", 1.0)])
def test_how_statistics_are_shared(how: str, mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(torch.device("cpu"), 1, 1, 2, None, torch.contiguous_format)
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(3))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, source: buffer.fill_(4))
    runtime.share_statistics(norm, how)
    assert norm.running_mean.tolist() == [mean] * 3
    assert norm.num_batches_tracked == 0
