"""Which checkpoints are kept and which is the best, by brute force: ties, numbers that are none, both directions."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from classification.run.checkpoints import LAST, Saver
from classification.run.state import State

Metrics = list[float | None]
METRICS = st.sampled_from([None, math.nan, math.inf, -math.inf, 0.0, 1.0, 1.0, 2.0, 3.0])


def saver(folder: Path, decreasing: bool, keep: int) -> Saver:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = State(model=model, optimizer=optimizer)
    return Saver(state, {"model": "line"}, folder, decreasing=decreasing, max_history=keep)


def ranked(metrics: Metrics, decreasing: bool) -> list[int]:
    """Epochs from the best: of equal ones the earlier first; those without a finite number last, newest first."""
    finite = {epoch: m for epoch, m in enumerate(metrics) if m is not None and math.isfinite(m)}
    sign = 1 if decreasing else -1
    order = sorted(finite, key=lambda epoch: (sign * finite[epoch], epoch))
    return order + [epoch for epoch in reversed(range(len(metrics))) if epoch not in finite]


def kept(metrics: Metrics, decreasing: bool, keep: int) -> tuple[list[int], int | None]:
    """One epoch after the other: what is not among the best when it ends is gone."""
    left: list[int] = []
    for epoch in range(len(metrics)):
        left = [e for e in ranked(metrics[: epoch + 1], decreasing) if e in left or e == epoch][:keep]
    finite = [e for e in ranked(metrics, decreasing) if metrics[e] is not None and math.isfinite(metrics[e] or 0.0)]
    return left, finite[0] if finite else None


@pytest.mark.parametrize("decreasing", [False, True])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(metrics=st.lists(METRICS, min_size=1, max_size=6), keep=st.integers(1, 3))
def test_the_best_are_kept(decreasing: bool, metrics: Metrics, keep: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = saver(folder, decreasing, keep)
        for epoch, metric in enumerate(metrics):
            (folder / "new").write_text(str(epoch))
            one.place(folder / "new", epoch, metric)
            (folder / "new").unlink()
        expected, best = kept(metrics, decreasing, keep)
        assert [int(Path(file).name.split("-")[1].split(".")[0]) for file, _ in one.checkpoint_files] == expected
        assert {file.name for file in folder.glob("checkpoint-*")} == {f"checkpoint-{e}.pth.tar" for e in expected}
        assert (folder / LAST).read_text() == str(len(metrics) - 1)
        assert one.best_epoch == best
        assert one.best_metric == (None if best is None else metrics[best])
        if best is not None:
            assert (folder / "model_best.pth.tar").read_text() == str(best)
        assert (folder / "model_best.pth.tar").exists() == (best is not None)


@pytest.mark.parametrize("decreasing", [False, True])
@pytest.mark.parametrize("odd", [None, math.nan, math.inf, -math.inf])
def test_an_older_checkpoint_brings_no_rank_that_is_none(tmp_path: Path, odd: float | None, decreasing: bool) -> None:
    """As the start of a run from a file by its name: nothing would ever be better than NaN, or than infinity."""
    one = saver(tmp_path, decreasing, keep=3)
    one.save_checkpoint(0, odd)
    saved = torch.load(tmp_path / LAST, weights_only=True)
    other = saver(tmp_path, decreasing, keep=3)
    other.restore_history(saved, tmp_path / LAST, newest=False)
    assert (other.best_epoch, other.best_metric) == (None, None)
    for epoch, metric in ((1, 2.0), (2, 1.0), (3, 2.0)):
        other.save_checkpoint(epoch, metric)
    assert other.best_epoch == (2 if decreasing else 1)


@pytest.mark.parametrize("decreasing", [False, True])
def test_an_epoch_without_a_metric_stays_the_last(tmp_path: Path, decreasing: bool) -> None:
    one = saver(tmp_path, decreasing, keep=4)
    for epoch, metric in enumerate([None, 3.0, 5.0]):
        one.save_checkpoint(epoch, metric)
    saved = torch.load(tmp_path / LAST, weights_only=True)
    saved["history"]["files"] = [
        file for file in saved["history"]["files"] if file[1] != 5.0
    ]  # as before its own place
    other = saver(tmp_path, decreasing, keep=4)
    other.restore_history(saved, tmp_path / LAST, newest=False)
    assert [metric for _, metric in other.checkpoint_files] == ([3.0, 5.0, None] if decreasing else [5.0, 3.0, None])


def test_a_number_that_is_none_does_not_outlive_a_resume(tmp_path: Path) -> None:
    one = saver(tmp_path, decreasing=False, keep=2)
    one.save_checkpoint(0, 5.0)
    one.save_checkpoint(1, math.nan)
    saved = torch.load(tmp_path / LAST, weights_only=True)
    other = saver(tmp_path, decreasing=False, keep=2)
    other.restore_history(saved, tmp_path / LAST, newest=True)
    assert (other.best_epoch, other.best_metric) == (0, 5.0)
    assert [metric for _, metric in other.checkpoint_files] == [5.0, None]
    other.save_checkpoint(2, 6.0)
    other.save_checkpoint(3, 5.0)
    assert (other.best_epoch, other.best_metric) == (2, 6.0)
    assert [metric for _, metric in other.checkpoint_files] == [6.0, 5.0]
    assert Path(other.checkpoint_files[1][0]).name == "checkpoint-0.pth.tar"  # of equal ones the earlier
