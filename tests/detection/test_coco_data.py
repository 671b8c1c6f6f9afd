"""COCO files of other tools: sizes that are none are the files', and nothing is left out or misread in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detection.checks import check_data
from detection.config import read
from revnets.training.errors import UserError

from .conftest import tiny_config

Content = dict[str, Any]
Change = Callable[[Content], object]
ORIENTATION = 0x0112


@pytest.fixture
def own(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes, to be damaged."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


@pytest.fixture
def cfg(own: Path, tmp_path: Path) -> Any:
    """A configuration for it."""
    return read(str(tiny_config(tmp_path, own)))


def change(data: Path, how: Change, split: str = "train") -> Content:
    path = data / f"{split}.json"
    content: Content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))
    return content


def built(dataset: Any, **more: Any) -> Any:
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    dataset.update(more)
    return DATASETS.build(dataset)


def every(kind: str, **values: Any) -> Change:
    def how(content: Content) -> None:
        for entry in content[kind]:
            entry.update(values)

    return how


def first(kind: str, **values: Any) -> Change:
    return lambda content: content[kind][0].update(values)


NO_SIZES = {
    "minus one": {"width": -1, "height": -1},
    "zero": {"width": 0, "height": 0},
    "null": {"width": None, "height": None},
    "text": {"width": "128", "height": "128"},
    "no number": {"width": float("nan"), "height": float("inf")},
    "true": {"width": True, "height": True},
    "one of them": {"width": -1},
}


@pytest.mark.parametrize("what", NO_SIZES)
def test_sizes_that_are_none_are_those_of_the_files(
    what: str, own: Path, cfg: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from revnets.mm.coco import use_checked

    for split in ("train", "val"):
        change(own, every("images", **NO_SIZES[what]), split)
    check_data(cfg, ["train", "val"])
    assert "train.json': 8 images have no size in the annotations, that of the file is used" in caplog.text
    assert "skipped" not in caplog.text
    use_checked(cfg)
    dataset = built(cfg.train_dataloader.dataset, serialize_data=False)
    assert len(dataset) == 8
    assert {(each["width"], each["height"]) for each in dataset.data_list} == {(128, 128)}
    assert all(each["instances"] for each in dataset.data_list)


def test_sizes_that_are_missing(own: Path, cfg: Any) -> None:
    change(own, lambda content: [image.pop("width") for image in content["images"]])
    check_data(cfg, ["train"])
    assert len(built(cfg.train_dataloader.dataset)) == 8


def test_a_data_set_of_another_kind_reads_no_sizes(own: Path, cfg: Any) -> None:
    change(own, first("images", width=-1))
    cfg.train_dataloader.dataset.update(type="DeepFashionDataset")
    with pytest.raises(UserError, match=r"'width' and 'height' -1 x 128.*DeepFashionDataset reads none"):
        check_data(cfg, ["train"])


def test_sizes_of_another_image(own: Path, cfg: Any) -> None:
    change(own, first("images", width=64, height=64))
    with pytest.raises(UserError, match="64 x 64 in the annotations, 128 x 128 in the file"):
        check_data(cfg, ["train"])


def narrow(data: Path, exif: int | None) -> str:
    """The first training image as a JPEG file of 96 x 128 pixels, which may be turned."""
    picture = Image.open(data / "train" / "00000.png").convert("RGB").crop((0, 0, 96, 128))
    metadata = Image.Exif()
    if exif is not None:
        metadata[ORIENTATION] = exif
    picture.save(data / "train" / "narrow.jpg", exif=metadata)
    return "narrow.jpg"


def placed(name: str, size: tuple[int, int], box: list[float]) -> Change:
    def how(content: Content) -> None:
        content["images"][0].update(file_name=name, width=size[0], height=size[1])
        number = content["images"][0]["id"]
        for each in content["annotations"]:
            if each["image_id"] == number:
                each["bbox"], each["segmentation"] = box, [[1, 1, 9, 1, 9, 9]]

    return how


def test_width_and_height_exchanged(own: Path, cfg: Any) -> None:
    change(own, placed(narrow(own, None), (128, 96), [1, 1, 20, 20]))
    with pytest.raises(UserError, match="exchanged"):
        check_data(cfg, ["train"])


def test_images_that_exif_data_turn(own: Path, cfg: Any, caplog: pytest.LogCaptureFixture) -> None:
    name = narrow(own, 6)
    change(own, placed(name, (128, 96), [100, 1, 20, 20]))  # as it is seen
    check_data(cfg, ["train"])
    assert "EXIF" not in caplog.text
    change(own, placed(name, (96, 128), [1, 1, 20, 20]))  # as it is stored
    check_data(cfg, ["train"])
    assert "1 images are turned by their EXIF data" in caplog.text
    change(own, placed(name, (96, 128), [1, 100, 20, 20]))  # boxes, too
    with pytest.raises(UserError, match=r"as it is turned by its EXIF data.*color_ignore_orientation"):
        check_data(cfg, ["train"])
    cfg.train_dataloader.dataset.pipeline[0].color_type = "color_ignore_orientation"
    check_data(cfg, ["train"])
    change(own, placed(name, (-1, -1), [1, 100, 20, 20]))
    seen = built(cfg.train_dataloader.dataset, serialize_data=False).data_list[0]
    assert (seen["width"], seen["height"]) == (96, 128)


STOPS: dict[str, tuple[Change, str]] = {
    "category as text": (every("annotations", category_id="1"), "annotation 1 has category_id '1', expected a whole"),
    "category as fraction": (first("annotations", category_id=1.5), "category_id 1.5, expected a whole number"),
    "category that is true": (first("annotations", category_id=True), "category_id True, expected a whole number"),
    "crowds as text": (every("annotations", iscrowd="0"), "annotation 1 has iscrowd '0', expected 0 or 1"),
    "categories' ids as text": (first("categories", id="1"), "has id '1', expected a whole number"),
    "names as numbers": (first("categories", name=0), "has name 0, expected text"),
    "a name with a zero byte": (first("images", file_name="a\0b.png"), r"file_name 'a.x00b.png', expected text"),
    "half a letter in a name": (first("images", file_name="\ud8a0.png"), r"file_name '.ud8a0.png', expected text"),
    "half a letter in a category": (first("categories", name="\udc00"), r"name '.udc00', expected text"),
    "unknown categories": (every("annotations", category_id=99), "no image with an object.*category that the file"),
    "image as text": (first("annotations", image_id="1"), "annotation 1 has image_id '1', but the images' ids are"),
    "a box of text": (first("annotations", bbox=["1", "2", "3", "4"]), "annotation 1 has bbox"),
    "a box of truth": (first("annotations", bbox=[True, 2, 3, 4]), "annotation 1 has bbox"),
    "an endless box": (first("annotations", bbox=[0, 0, float("inf"), 4]), "annotation 1 has bbox"),
    "a negative width": (first("annotations", bbox=[9, 9, -3, 4]), "negative width"),
    "shares instead of pixels": (
        every("annotations", bbox=[0.1, 0.1, 0.3, 0.3]),
        "no image with an object.*narrower or lower than one pixel",
    ),
    "areas of nothing": (
        every("annotations", area=0),
        r"no image with an object.*annotations with an 'area' of 0 or less, though their boxes have one",
    ),
    "annotations of nothing": (lambda content: content.update(annotations=None), "no list 'annotations'"),
    "a mask of three numbers": (first("annotations", segmentation=[[1, 2, 3]]), "annotation 1 has a segmentation"),
    "a mask of text": (first("annotations", segmentation="abc"), "annotation 1 has a segmentation abc"),
    "a mask of NaN": (first("annotations", segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "has a segmentation"),
    "a mask of another size": (
        first("annotations", segmentation={"size": [9, 9], "counts": [81]}),
        r"of size \[9, 9\], but its image has height and width \[128, 128\]",
    ),
    "a mask that ends early": (first("annotations", segmentation={"size": [128, 128], "counts": [81]}), "counts"),
}


@pytest.mark.parametrize("what", STOPS)
def test_what_cannot_be_meant_is_named(what: str, own: Path, cfg: Any) -> None:
    how, words = STOPS[what]
    change(own, how)
    with pytest.raises(UserError, match=words):
        check_data(cfg, ["train"])


def test_images_that_show_nothing_to_learn(own: Path, cfg: Any, caplog: pytest.LogCaptureFixture) -> None:
    def how(content: Content) -> None:
        for each in content["annotations"]:
            if each["image_id"] == content["images"][0]["id"]:
                each["bbox"][2] = 0
            if each["image_id"] == content["images"][1]["id"]:
                each["iscrowd"] = 1

    change(own, how)
    check_data(cfg, ["train"])
    assert "1 images without an object are skipped (1 none that can be used: 00000.png)" in caplog.text
    assert "1 images have crowds alone, no object to learn (00001.png)" in caplog.text
    caplog.clear()
    dataset = built(cfg.train_dataloader.dataset, serialize_data=False)
    assert [Path(each["img_path"]).name for each in dataset.data_list] == [f"{n:05}.png" for n in range(1, 8)]


def test_corners_instead_of_sizes(own: Path, cfg: Any, caplog: pytest.LogCaptureFixture) -> None:
    def how(content: Content) -> None:
        for each in content["annotations"]:
            x, y, width, height = each["bbox"]
            each["bbox"] = [60 + x / 4, 60 + y / 4, 70 + x / 4 + width, 70 + y / 4 + height]

    change(own, how)
    check_data(cfg, ["train"])
    assert "boxes reach out of their images" in caplog.text
    assert "are they [x1, y1, x2, y2]?" in caplog.text


def test_nothing_to_measure_on(own: Path, cfg: Any) -> None:
    change(own, lambda content: content.update(annotations=[]), "val")
    with pytest.raises(UserError, match="no object to measure on"):
        check_data(cfg, ["val"])


def test_measured_on_what_is_trained_on(own: Path, cfg: Any, caplog: pytest.LogCaptureFixture) -> None:
    check_data(cfg, ["train", "val"])
    assert not caplog.text
    cfg.val_dataloader.dataset.update(ann_file="train.json", data_prefix={"img": "train/"})
    cfg.val_evaluator.ann_file = str(own / "train.json")
    check_data(cfg, ["train", "val"])
    assert "is what is trained on, too" in caplog.text
    shutil.copy(own / "train.json", own / "other.json")
    cfg.val_dataloader.dataset.ann_file = "other.json"
    check_data(cfg, ["train", "val"])
    assert "8 of 8 images are trained on, too" in caplog.text


def test_an_evaluator_of_other_images(own: Path, cfg: Any) -> None:
    change(own, lambda content: [image.update(file_name=f"x{image['id']}.png") for image in content["images"]], "test")
    cfg.val_evaluator.ann_file = str(own / "test.json")
    with pytest.raises(UserError, match=r"val_evaluator: .*test.json' is of other images than val data"):
        check_data(cfg, ["val"])


def perfect(metric: Any, content: Content) -> dict[str, float]:
    """What a detector gets that finds everything."""
    import torch

    for image in content["images"]:
        mine = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        masks = [_bitmap(each["segmentation"]) for each in mine]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in mine)])
        numbers = [each["id"] for each in content["categories"]]
        found = {
            "bboxes": boxes,
            "scores": torch.ones(len(mine)),
            "labels": torch.tensor([numbers.index(each["category_id"]) for each in mine]),
            "masks": torch.stack(masks),
        }
        metric.process({}, [{"img_id": image["id"], "ori_shape": (128, 128), "pred_instances": found}])
    return dict(metric.evaluate(len(content["images"])))


def _bitmap(segmentation: Any) -> Any:
    import torch
    from pycocotools import mask

    coded = mask.frPyObjects(segmentation, 128, 128)
    coded = mask.merge(coded) if isinstance(coded, list) else coded
    return torch.from_numpy(mask.decode(coded).copy()).bool()


@pytest.mark.parametrize("sizes", ["right", "none"])
def test_a_perfect_detector_gets_everything(sizes: str, own: Path) -> None:
    from revnets.mm.coco import CheckedCocoMetric

    def how(content: Content) -> None:
        for number, each in enumerate(content["annotations"]):
            each["id"] = number  # from 0, which pycocotools takes for nothing
        if sizes == "none":
            every("images", width=-1, height=-1)(content)

    content = change(own, how, "val")
    metric = CheckedCocoMetric(ann_file=str(own / "val.json"), metric=["bbox", "segm"])
    metric.dataset_meta = {"classes": tuple(each["name"] for each in content["categories"])}
    results = perfect(metric, content)
    assert results["coco/bbox_mAP"] == pytest.approx(1)
    assert results["coco/segm_mAP"] == pytest.approx(1)


def test_the_data_set_says_what_it_leaves_out(own: Path, cfg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from revnets.mm import coco

    said: list[str] = []
    monkeypatch.setattr(coco, "print_log", lambda text, **more: said.append(text))

    def how(content: Content) -> None:
        content["images"][0].update(width=-1)
        number = content["images"][1]["id"]
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] != number]

    change(own, how)
    built(cfg.train_dataloader.dataset)  # as MMDetection's own tools would, from our configurations
    assert any("sizes of 1 images are those of the files" in text for text in said)
    assert any("1 images without an object are skipped (00001.png)" in text for text in said)
    said.clear()
    built(cfg.train_dataloader.dataset, report=False)
    assert not said
    change(own, every("annotations", category_id="3"))
    with pytest.raises(ValueError, match="category_id '3', expected a number"):
        built(cfg.train_dataloader.dataset)
