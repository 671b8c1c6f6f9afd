"""Digits scenes: valid COCO, true to what was drawn, the same again, no scan in two splits."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.digits import CLASSES, OVERLAP, SceneOptions, _shared, _splits, main, make_scenes
from revnets.training.errors import UserError

OPTIONS = SceneOptions(train=8, val=2, test=2)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_is_valid_coco(scenes: Path, split: str) -> None:
    from pycocotools.coco import COCO

    coco = COCO(str(scenes / f"{split}.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.getImgIds()) == getattr(OPTIONS, split)
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(scenes / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        found = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert found
        boxes = [tuple(int(value) for value in each["bbox"]) for each in found]
        for each, (x, y, w, h) in zip(found, boxes, strict=True):
            rows, columns = np.nonzero(coco.annToMask(each))
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + w, y + h)
            assert len(rows) == each["area"] > 0
        assert all(_shared(a, b) <= OVERLAP for i, a in enumerate(boxes) for b in boxes[:i])


def test_no_scan_is_in_two_splits() -> None:
    parts = {name: {scan.tobytes() for scan in scans} for name, scans, _ in _splits(42)}
    assert {name: len(scans) for name, scans, _ in _splits(42)} == {"train": 1237, "val": 200, "test": 360}
    same = parts["train"] & parts["test"] | parts["train"] & parts["val"] | parts["val"] & parts["test"]
    assert not same


def test_same_seed_same_files_other_seed_others(scenes: Path, tmp_path: Path) -> None:
    again = make_scenes(tmp_path / "again", OPTIONS)
    files = sorted(path.relative_to(scenes) for path in scenes.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((scenes / name).read_bytes() == (again / name).read_bytes() for name in files)
    other = make_scenes(tmp_path / "other", SceneOptions(train=1, val=1, test=1, seed=1))
    assert (other / "train/00000.png").read_bytes() != (scenes / "train/00000.png").read_bytes()


def test_made_once_and_nothing_else_is_overwritten(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (scenes / "train.json").stat().st_mtime_ns
    assert make_scenes(scenes, OPTIONS) == scenes
    assert (scenes / "train.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds other files"):
        make_scenes(scenes, SceneOptions(train=9, val=2, test=2))
    assert main(["--data-dir", str(tmp_path / "small"), "--size", "10"]) == 2
    assert capsys.readouterr().err.startswith("error: scenes of")
    assert not (tmp_path / "small").exists()


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fails)
    with pytest.raises(OSError, match="disk full"):
        make_scenes(tmp_path / "scenes", OPTIONS)
    assert list(tmp_path.iterdir()) == []
