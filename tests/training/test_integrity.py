"""Damage is found, wherever it is; a full disk is said."""

import errno
from pathlib import Path

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
