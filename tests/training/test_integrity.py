"""Damage is found, wherever it is; a full disk is said."""

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from revnets.training.integrity import NotWritten, damage, writing


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
    with pytest.raises(NotWritten, match=words), writing("x.pth"):
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
    from classification.report import Summary

    Summary(folder).add({"epoch": 0.0, "train_loss": 1.0})


def curves(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    from classification.report import draw_curves

    draw_curves(folder, [{"epoch": 0.0, "train_loss": 1.0}], "run")


def options(folder: Path) -> None:
    from classification.report import write_args

    write_args(folder, {"model": "resnet18"})


def detections(folder: Path) -> None:
    from detection.report import write_summary

    write_summary(folder, {"coco/bbox_mAP": 0.5})


@pytest.mark.parametrize("save", [summary, curves, options, detections])
def test_reports_that_find_no_space(
    save: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from classification.errors import guarded

    def full() -> None:
        with space(4):
            save(tmp_path)

    assert guarded(full) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"error: '{tmp_path}/" in said
    assert "cannot be written (File too large): free space there" in said
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
