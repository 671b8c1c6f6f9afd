"""Damage is found, wherever it is; a full disk is said."""

import errno
import importlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from revnets.training.checkpoints.integrity import damage
from revnets.training.files import NotWritten, writing


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"weight": torch.randn(64, 64), "epoch": 3}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_a_flipped_bit_of_a_tensor_or_the_pickle_is_found(saved: Path) -> None:
    assert damage(saved) == ""
    whole = bytearray(saved.read_bytes())
    tensor, pickle = whole.find(b"FB") + 8000, whole.find(b"weight")
    for place in (tensor, pickle):
        changed = bytearray(whole)
        changed[place] ^= 1
        saved.write_bytes(changed)
        assert "checksum" in damage(saved)


def flipped(whole: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(whole)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_a_bit_that_says_several_disks(saved: Path) -> None:
    from classification.networks.models import read_checkpoint
    from revnets.training.errors import UserError

    whole = saved.read_bytes()
    saved.write_bytes(flipped(whole, whole.rfind(b"PK\x06\x07") + 16, 1))
    with pytest.raises(UserError, match="cannot be read as a checkpoint: it is truncated"):
        read_checkpoint(saved, "--resume")


def test_a_bit_that_says_encrypted(saved: Path) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(flipped(whole, whole.find(b"PK\x01\x02") + 8, 0))
    assert damage(saved) == "it is truncated, or no checkpoint"


@pytest.mark.parametrize("script", ["classification", "detection"])
def test_what_no_checksum_covers_is_read_before_it_is_chosen(
    script: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The directory at the end of the archive has no checksum: some flipped bits there are seen by torch alone."""
    if script == "detection":
        pytest.importorskip("mmengine", reason="MMEngine is not installed: pip install 'revnets[detection]'")
    room = "classification.run" if script == "classification" else script
    chooser = importlib.import_module(f"{room}.checkpoints")
    older, newer = ("a", "b") if script == "classification" else ("epoch_1", "epoch_2")
    ending = "pth.tar" if script == "classification" else "pth"
    files = [tmp_path / f"{name}.{ending}" for name in (older, newer)]
    for age, file in enumerate(files):
        torch.save({"state_dict": {"weight": torch.zeros(4)}}, file)
        os.utime(file, (age, age))
    (tmp_path / "last_checkpoint").write_text(str(files[1]))
    whole = files[1].read_bytes()
    missed = 0
    for place in range(whole.find(b"PK\x01\x02"), len(whole)):
        files[1].write_bytes(flipped(whole, place, place % 8))
        chosen = chooser.newest_whole(tmp_path)
        missed += chosen == files[0] and damage(files[1]) == ""
        if chosen == files[1]:
            assert torch.load(chosen, weights_only=True)["state_dict"]["weight"].tolist() == [0.0] * 4
    assert missed > 0
    assert f"{newer}.{ending}' is damaged (" in caplog.text


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncation_is_found(saved: Path, keep: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(keep * len(whole))])
    assert damage(saved) == "it is truncated, or no checkpoint"


def test_missing_file(tmp_path: Path) -> None:
    assert damage(tmp_path / "nothing") == "it cannot be read: No such file or directory"


def test_the_reason_is_found_behind_torchs_error() -> None:
    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 768 vs 662")  # noqa: B904  (as torch does)

    words = r"'x.pth' cannot be written \(No space left on device\): free space"
    with pytest.raises(NotWritten, match=words), writing("x.pth", (RuntimeError,)):
        write()


def test_a_device_without_space() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    words = "No space left on device"
    with pytest.raises(NotWritten, match=words), writing("/dev/full"), open("/dev/full", "wb") as file:
        torch.save({"weight": torch.randn(64, 64)}, file)


@contextmanager
def space(size: int) -> Iterator[None]:
    """Inside, the system refuses files larger than so many bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def summary(folder: Path) -> None:
    from classification.run.report import Summary

    Summary(folder).add({"epoch": 0.0, "train_loss": 1.0})


def curves(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    from classification.run.report import draw_curves

    draw_curves(folder, [{"epoch": 0.0, "train_loss": 1.0}], "run")


def options(folder: Path) -> None:
    from classification.run.report import write_args

    write_args(folder, {"model": "resnet18"})


def detections(folder: Path) -> None:
    from detection.report import write_summary

    write_summary(folder, {"coco/bbox_mAP": 0.5})


def checkpoint(folder: Path) -> None:
    from classification.run.checkpoints import Saver
    from classification.run.state import State

    model = torch.nn.Linear(500, 500)
    optimizer = torch.optim.SGD(model.parameters())
    state = State(model=model, optimizer=optimizer)
    Saver(state, {"model": "linear"}, folder, decreasing=False, max_history=1).save_checkpoint(0, 1.0)


def pruned(folder: Path) -> None:
    from revnets.pruning.checkpoint import save_weights

    save_weights(torch.nn.Linear(500, 500), folder / "pruned.safetensors", {})


@pytest.mark.parametrize("save", [summary, curves, options, detections, checkpoint, pruned])
def test_reports_that_find_no_space(
    save: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from revnets.training.errors import guarded

    def full() -> None:
        with space(4):
            save(tmp_path)

    assert guarded(full) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"error: '{tmp_path}/" in said
    assert "cannot be written (" in said
    assert "File too large" in said
    assert ": free space there" in said
    assert not list(tmp_path.iterdir())


def test_commands_that_find_no_space(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from revnets.cli import app

    with space(4):
        result = CliRunner().invoke(app, ["layers", "test_vit", "sparse_wide:0.75", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "revnets: '" in result.output
    assert "cannot be written (File too large): free space there" in result.output
    assert not list(tmp_path.iterdir())
