"""A toy run that is told to end, runs out of space, or finds its newest checkpoint damaged."""

import errno
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from detection import checkpoints
from revnets.training.errors import UserError, guarded
from tests.mm.hooks import test_resume as toy


class Told:
    """Sends SIGTERM in the so-manieth iteration of training or validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: str, call: int) -> None:
        real, calls = toy.Toy.forward, [0]

        def forward(model: Any, inputs: torch.Tensor, mode_: str = "tensor") -> Any:
            calls[0] += mode_ == mode
            if mode_ == mode and calls[0] == call:
                signal.raise_signal(signal.SIGTERM)
            return real(model, inputs, mode_)

        monkeypatch.setattr(
            toy.Toy, "forward", lambda model, inputs, mode="tensor", **more: forward(model, inputs, mode)
        )


@pytest.mark.parametrize(
    ("mode", "call", "where"),
    [("loss", 6, "iteration 6 (epoch 1)"), ("predict", 2, "iteration 4 (epoch 1)"), ("loss", 4, "iteration 4")],
    ids=["in an epoch", "in a validation", "at the end of an epoch"],
)
def test_sigterm_saves_and_ends_with_its_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    call: int,
    where: str,
) -> None:
    whole: list[tuple[int, float]] = []
    parts: list[tuple[int, float]] = []
    expected = toy.run(tmp_path / "whole", whole)
    with monkeypatch.context() as patch:
        Told(patch, mode, call)
        assert guarded(lambda: toy.run(tmp_path / "parts", parts, interim=100)) == 75
    said = capsys.readouterr().err
    assert f"SIGTERM at {where}" in said
    assert "is saved in" in said
    resumed = toy.run(tmp_path / "parts", parts, interim=100)
    assert parts == whole
    for key, value in expected.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_the_last_good_checkpoint_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for age, name in enumerate(("epoch_1.pth", "best_x_epoch_1.pth", "interim.pth", "epoch_2.pth")):
        torch.save({"weight": torch.randn(9)}, tmp_path / name)
        os.utime(tmp_path / name, (age, age))
    assert checkpoints.newest_whole(tmp_path) is None  # nothing says that a run was here
    (tmp_path / checkpoints.LAST).write_text("/moved/away/epoch_2.pth")
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "epoch_2.pth"
    spoil(tmp_path / "epoch_2.pth")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest_whole(tmp_path) == tmp_path / "interim.pth"
    assert "epoch_2.pth' is damaged (it is truncated" in caplog.text
    (tmp_path / "epoch_2.pth").unlink()
    spoil(tmp_path / "interim.pth")
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "epoch_1.pth"
    spoil(tmp_path / "epoch_1.pth")
    with pytest.raises(UserError, match="damaged or gone; start anew with --overwrite"):
        checkpoints.newest_whole(tmp_path)


def test_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from revnets.mm.hooks import checkpoint

    toy.run(tmp_path, [], stop=5)
    before = (tmp_path / "interim.pth").read_bytes()

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_through", full)
    assert guarded(lambda: toy.run(tmp_path, [])) == 2
    assert "interim.pth' cannot be written (No space left on device): free space" in capsys.readouterr().err
    assert (tmp_path / "interim.pth").read_bytes() == before
    assert not list(tmp_path.glob(".tmp-*"))
