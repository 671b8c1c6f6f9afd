"""The digits: complete, fixed, readable by timm, and made only once."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm.data import create_dataset

from classification import digits as script
from classification.digits import make_digits
from revnets.training.errors import UserError

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def test_all_scans_in_a_fixed_stratified_split(tmp_path: Path) -> None:
    assert script.main(["--data-dir", str(tmp_path / "d"), "--size", "16"]) == 0
    sets = {split: create_dataset("", root=str(tmp_path / "d"), split=split) for split in ("train", "validation")}
    assert {split: len(each) for split, each in sets.items()} == {"train": 1437, "validation": 360}
    image, _ = sets["validation"][0]
    assert image.size == (16, 16)
    assert image.mode == "RGB"
    held_out = [len(list(folder.iterdir())) for folder in sorted((tmp_path / "d" / "validation").iterdir())]
    assert sum(held_out) == 360
    assert all(34 <= count <= 38 for count in held_out)
    assert [each.name for each in tmp_path.iterdir()] == ["d"]


def test_made_once_and_alike(tmp_path: Path) -> None:
    first, second = make_digits(tmp_path / "a", limit=8), make_digits(tmp_path / "b", limit=8)
    files = sorted(path.relative_to(first) for path in first.rglob("*.png"))
    assert len(files) == 16
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    (first / files[0]).write_bytes(b"changed")
    make_digits(tmp_path / "a", limit=8)
    assert (first / files[0]).read_bytes() == b"changed"


def test_does_not_touch_other_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        make_digits(tmp_path / "a")
    make_digits(tmp_path / "b", limit=4)
    with pytest.raises(UserError, match="holds other files"):
        make_digits(tmp_path / "b", size=64, limit=4)
    assert (tmp_path / "a" / "precious.txt").read_text() == "mine"
