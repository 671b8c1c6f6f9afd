"""A data set in COCO's format as a configuration names it, and its file, read and looked at entry by entry."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from revnets.training.errors import UserError, did_you_mean, one_line

NEEDED = {  # keys of an entry
    "images": ("id", "file_name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}
NUMBERS, TEXTS = ("area",), ("file_name", "name")
WHOLE = {"annotations": ("id", "category_id"), "categories": ("id",)}  # pycocotools computes with them
WORDS = {"images": "image", "annotations": "annotation", "categories": "category"}


@dataclasses.dataclass(frozen=True)
class Split:
    """One data set in COCO's format, as a configuration names it."""

    name: str
    annotations: Path
    images: Path
    classes: tuple[str, ...]
    min_size: int
    filter_empty: bool
    training: bool
    masks: bool
    kind: str  # of MMDetection's data sets
    measured: bool  # sizes that are none are read from the files
    turned: bool  # images are turned as their EXIF data say
    measures: bool  # it is to be measured on, not only to write results for

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.name} data: '{self.annotations}'"


def splits(name: str, dataset: Any, measures: bool = True) -> Iterator[Split]:
    """Data sets in COCO's format, inside of wrappers (repeated, balanced, concatenated), too.

    Args:
        name: train, val or test.
        dataset: As configured.
        measures: Whether its metrics are computed.
    """
    inner = dataset.get("datasets") or ([dataset["dataset"]] if "dataset" in dataset else [])
    for each in inner:
        yield from splits(name, each, measures)
    if inner or not isinstance(dataset.get("ann_file"), str) or not dataset["ann_file"].endswith(".json"):
        return
    from mmdet.registry import DATASETS

    from revnets.mm.coco import coco_datasets, ignores_orientation

    kind = DATASETS.get(dataset["type"]) if isinstance(dataset["type"], str) else dataset["type"]
    if getattr(kind, "COCOAPI", None) is None:
        return
    info = {**kind.METAINFO, **dataset.get("metainfo", {})}
    classes = info.get("classes") or ()
    root = dataset.get("data_root") or ""
    images = (dataset.get("data_prefix") or {}).get("img", "")
    filters = dataset.get("filter_cfg") or {}
    training = not dataset.get("test_mode", False)
    yield Split(
        name,
        Path(root, dataset["ann_file"]),
        Path(root, images),
        (classes,) if isinstance(classes, str) else tuple(classes),
        filters.get("min_size", 0) if training else 0,
        filters.get("filter_empty_gt", False) and training,
        training,
        any(step.get("with_mask") for step in dataset.get("pipeline") or []),
        kind.__name__,
        bool(coco_datasets(dataset)),
        not ignores_orientation(dataset.get("pipeline")),
        measures and not training,
    )


def read(split: Split) -> dict[str, Any]:
    """The content of a COCO file, whose entries have what the format asks for.

    Raises:
        UserError: It cannot be read, or an entry lacks something or has it of a wrong kind; the first is named.
    """
    try:
        content = json.loads(split.annotations.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{split.where} cannot be read ({error.strerror}); give the data's folder as --cfg-options data_root=/path."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{split.where} is no JSON ({one_line(error)}); it is damaged or another file.") from None
    for key in NEEDED:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{split.where} has no list '{key}', which COCO's format asks for; give a COCO file.")
        for number, entry in enumerate(content[key]):
            _require(split.where, key, number, entry)
        _check_ids(split.where, key, content[key])
    if not content["images"]:
        purpose = "train on" if split.training else "measure"
        raise UserError(f"{split.where} lists no images; there is nothing to {purpose}.")
    _check_references(split.where, content)
    return content


def _require(where: str, kind: str, number: int, entry: Any) -> None:
    """An entry has what COCO's format asks for, of the right type."""
    given = entry if isinstance(entry, dict) else {}
    for key in NEEDED[kind]:
        value = given.get(key)
        expected = "a number"
        if key in NUMBERS:
            fits = is_number(value)
        elif key in TEXTS:
            fits, expected = _is_name(value), "text, as of a file"
        elif key in WHOLE.get(kind, ()):
            fits, expected = _is_whole(value), "a whole number"
        elif key in ("id", "image_id"):
            fits, expected = _is_whole(value) or isinstance(value, str), "a whole number"
        else:
            fits = value is not None
        if not fits:
            name = f"{WORDS[kind]} {f'number {number}' if given.get('id') is None else given['id']}"
            problem = f"has no '{key}'" if value is None else f"has {key} {value!r}, expected {expected}"
            raise UserError(f"{where}: {name} {problem}; COCO's format asks for it, correct the file.")
    if kind == "annotations" and given.get("iscrowd") not in (None, 0, 1):  # text would be true, "0" too
        raise UserError(
            f"{where}: annotation {given['id']} has iscrowd {given['iscrowd']!r}, expected 0 or 1; correct the file."
        )


def _check_ids(where: str, kind: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """No two entries share an id: pycocotools would keep the last one alone, and measure wrongly without a word."""
    twice = [each for each, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if twice:
        raise UserError(
            f"{where}: {len(twice)} ids stand for more than one {WORDS[kind]} ({some(twice)}); COCO's format asks for "
            "different ones, number them anew."
        )


def _check_references(where: str, content: Mapping[str, Any]) -> None:
    """Annotations name their images as the images name themselves: '1' is not 1."""
    kinds = {type(image["id"]) for image in content["images"]}
    for each in content["annotations"]:
        if type(each["image_id"]) not in kinds:
            raise UserError(
                f"{where}: annotation {each['id']} has image_id {each['image_id']!r}, but the images' ids are such as "
                f"{content['images'][0]['id']!r}; write both alike, as whole numbers."
            )


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_name(value: Any) -> bool:
    """Text that a file can have for its name and a terminal can show: JSON writes zero bytes and halves of letters."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_categories(where: str, classes: Sequence[str], categories: Sequence[Mapping[str, Any]]) -> None:
    """Compares a file's categories with the classes of the configuration.

    Raises:
        UserError: One is missing, or the order differs, by which MMDetection numbers them.
    """
    names = [str(category["name"]) for category in categories]
    missing = [name for name in classes if name not in names]
    if missing:
        hint = did_you_mean(missing[0], names)
        raise UserError(
            f"{where} has the categories {some(names)}, but the configuration expects '{missing[0]}'{hint}; set "
            "dataset.metainfo.classes and the heads' num_classes to the file's."
        )
    kept = [name for name in names if name in classes]
    if kept != list(classes) and classes:
        raise UserError(
            f"{where} lists its categories as {some(kept)}, the configuration as {some(classes)}: MMDetection "
            "numbers them by the file; set dataset.metainfo.classes in that order."
        )


def check_box(where: str, each: Mapping[str, Any]) -> None:
    """An annotation's box is four numbers, and no side is negative.

    Raises:
        UserError: It is not.
    """
    box = each["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        problem = f"has bbox {box!r}, expected [x, y, width, height]"
    elif min(box[2:]) < 0:
        problem = f"has bbox {box!r} of negative width or height, expected [x, y, width, height]"
    else:
        return
    raise UserError(f"{where}: annotation {each['id']} {problem}; correct it.")


def check_mask(where: str, each: Mapping[str, Any], size: tuple[int, int]) -> None:
    """An annotation's mask is polygons or run lengths, of which MMDetection ignores the wrong ones silently.

    Args:
        where: For messages.
        each: The annotation.
        size: Width and height of its image.

    Raises:
        UserError: There is none, or it is neither.
    """
    mask = each.get("segmentation")
    if not mask:
        raise UserError(
            f"{where}: annotation {each['id']} has no 'segmentation', but the pipeline loads masks (with_mask=True); "
            "give a file with masks, or train a detector of boxes."
        )
    problem = _polygons(mask) if isinstance(mask, list) else _run_lengths(mask, size)
    if problem:
        raise UserError(f"{where}: annotation {each['id']} has a segmentation {problem}; correct it.")


def _polygons(mask: Sequence[Any]) -> str:
    for polygon in mask:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(is_number, polygon)):
            return f"with a part {str(polygon)[:60]}, expected [x1, y1, x2, y2, x3, y3, ...]"
    return ""


def _run_lengths(mask: Any, size: tuple[int, int]) -> str:
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), (list, str)) or "size" not in mask:
        return f"{str(mask)[:60]}, expected polygons, or a size and counts"
    if mask["size"] != [size[1], size[0]]:
        return f"of size {mask['size']!r}, but its image has height and width {[size[1], size[0]]}"
    if isinstance(mask["counts"], list):
        counts = mask["counts"]
        if not all(_is_whole(n) and n >= 0 for n in counts) or sum(counts) != size[0] * size[1]:
            return f"whose counts are not those of its {size[0] * size[1]} pixels"
    return ""


def some(values: Sequence[Any], count: int = 5) -> str:
    """The first few, for messages."""
    return ", ".join(str(value) for value in values[:count]) + (", ..." if len(values) > count else "")
