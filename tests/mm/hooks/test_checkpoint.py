"""Whole checkpoints: saved between updates only, and nothing goes that is still wanted."""

from collections import deque
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from revnets.mm import WholeCheckpointHook  # noqa: E402
from tests.mm.hooks.test_resume import run  # noqa: E402


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_gradients_that_are_being_gathered_are_not_lost(tmp_path: Path, stop: int) -> None:
    """An interruption between two batches of an update: the run goes on from the update before."""
    whole: list[tuple[int, float]] = []
    parts: list[tuple[int, float]] = []
    expected = run(tmp_path / "whole", whole, accumulate=2)
    run(tmp_path / "parts", parts, stop, accumulate=2)
    saved = (tmp_path / "parts" / "last_checkpoint").exists()
    assert saved == (stop > 1)
    if saved:
        last = torch.load((tmp_path / "parts" / "last_checkpoint").read_text(), weights_only=False)
        assert last["meta"]["iter"] == stop - stop % 2
    found = run(tmp_path / "parts", parts, accumulate=2)
    for a, b in zip(expected.model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert dict(parts) == dict(whole)


def test_an_epoch_that_is_repeated_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill the last epoch may be saved again: it is no further one, and none goes for it."""
    hook = WholeCheckpointHook(max_keep_ckpts=2)
    hook.out_dir, hook.filename_tmpl, hook.keep_ckpt_ids = str(tmp_path), "epoch_{}.pth", deque(maxlen=2)
    monkeypatch.setattr(hook, "_save", lambda runner, name, meta: (tmp_path / name).write_text(name))
    for step, expected in [(1, {1}), (2, {1, 2}), (2, {1, 2}), (3, {2, 3}), (3, {2, 3})]:
        hook._save_checkpoint_with_step(MagicMock(), step, {})
        assert {path.name for path in tmp_path.iterdir()} == {f"epoch_{n}.pth" for n in expected}


@pytest.mark.parametrize("score", [0.95, 0.9, 0.1])
def test_a_best_epoch_that_is_validated_again_stays(tmp_path: Path, score: float) -> None:
    runner: Any = run(tmp_path, [], save_best="score", rule="greater")
    hook = next(hook for hook in runner.hooks if isinstance(hook, WholeCheckpointHook))
    best = Path(str(hook.best_ckpt_path))
    assert best.name == "best_score_epoch_2.pth"
    runner.train_loop._epoch = 2
    hook._save_best_checkpoint(runner, {"score": score})
    assert best.exists()
    assert [path.name for path in tmp_path.glob("best_*.pth")] == [best.name]
    runner.train_loop._epoch = 3
    hook._save_best_checkpoint(runner, {"score": 0.99})
    assert [path.name for path in tmp_path.glob("best_*.pth")] == ["best_score_epoch_3.pth"]
