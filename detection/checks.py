"""Looks at annotations, images and checkpoints before a run: what would fail or mislead later is said now."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from detection.checkpoints import Checkpoint
from revnets.training.errors import UserError, did_you_mean, one_line

_logger = logging.getLogger("detection")
JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
NEEDED = {  # keys of an entry
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}
NUMBERS, IDS, TEXTS = ("width", "height", "area"), ("id", "image_id", "category_id"), ("file_name",)
WORDS = {"images": "image", "annotations": "annotation", "categories": "category"}
COCO_PARTS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "mAP_copypaste")
CELL = 32  # pixels of the coarsest map's cells, to which images are padded


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


def check_data(cfg: Any, names: Sequence[str]) -> None:
    """Goes over all annotations and image files of data sets in COCO's format.

    What MMDetection skips is counted and warned of: annotations of no or an unwanted category, boxes without area,
    images too small to train on. All else stops.

    Args:
        cfg: The configuration.
        names: Of its data sets: train, val, test.

    Raises:
        UserError: A file that is missing, truncated or no annotations; categories that are not those of the
            configuration; nothing to train on.
    """
    seen = set()
    for name in names:
        loader = cfg.get(f"{name}_dataloader")
        for split in _splits(name, loader["dataset"] if loader else {}):
            if (split.annotations, split.training) in seen:
                continue
            seen.add((split.annotations, split.training))
            content = _read(split)
            _check_categories(split, content["categories"])
            usable = _check_annotations(split, content)
            _check_images(split, content["images"], usable)
    for name in names:
        for evaluator in _evaluators(cfg.get(f"{name}_evaluator")):
            path = evaluator.get("ann_file")
            if path and not Path(path).is_file():
                raise UserError(f"{name}_evaluator: there is no annotation file '{path}'; set data_root or ann_file.")


def check_classes(cfg: Any) -> None:
    """Compares the heads' `num_classes` with the number of class names.

    Raises:
        UserError: They differ.
    """
    names = {split.classes for split in _splits("train", cfg.train_dataloader["dataset"])}
    for count, where in _num_classes(cfg.model, "model"):
        for classes in names:
            if classes and count != len(classes):
                raise UserError(
                    f"{where}.num_classes={count}, but the training data have {len(classes)} classes "
                    f"({_some(classes)}); set both alike."
                )


def check_save_best(cfg: Any) -> None:
    """Compares the metric that chooses the best checkpoint with those of COCO's evaluators, before an epoch is spent.

    Raises:
        UserError: There is none of that name.
    """
    wanted = ((cfg.get("default_hooks") or {}).get("checkpoint") or {}).get("save_best")
    evaluators = _evaluators(cfg.get("val_evaluator"))
    if not wanted or not evaluators or any(each.get("type") != "CocoMetric" for each in evaluators):
        return
    known = ["auto"]
    for each in evaluators:
        if each.get("classwise") or each.get("prefix"):
            return  # then names depend on the classes
        metrics = each.get("metric", "bbox")
        for metric in [metrics] if isinstance(metrics, str) else metrics:
            known += [f"coco/{metric}_{part}" for part in COCO_PARTS]
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in known and not name.startswith(("coco/AR@", "coco/proposal")):
            hint = did_you_mean(name, known)
            raise UserError(
                f"default_hooks.checkpoint.save_best: CocoMetric gives no '{name}'{hint}; give coco/bbox_mAP, say."
            )


def check_neck(model: nn.Module) -> None:
    """Compares what the backbone gives with what the neck takes.

    Raises:
        UserError: They differ.
    """
    model = getattr(model, "module", model)
    gives = getattr(getattr(model, "backbone", None), "out_channels", None)
    takes = getattr(getattr(model, "neck", None), "in_channels", None)
    if isinstance(gives, list) and isinstance(takes, (list, tuple)) and list(gives) != list(takes):
        raise UserError(
            f"model.neck.in_channels={list(takes)}, but the backbone gives {list(gives)} channels; set both alike."
        )


def check_weights(model: nn.Module, checkpoint: Checkpoint, *, whole: bool) -> None:
    """Compares a checkpoint's tensors with the model's.

    Args:
        model: That is to load it.
        checkpoint: As read.
        whole: Everything must fit; otherwise, as for fine-tuning, only the backbone must, and the rest is counted.

    Raises:
        UserError: It is of another architecture.
    """
    state, what = checkpoint.state, checkpoint.what
    model = getattr(model, "module", model)
    own = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    bad = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    stray = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    fatal = bad + stray if whole else [key for key in bad if key.startswith("backbone.")]
    if fatal:
        key = fatal[0]
        there = tuple(state[key].shape) if key in state else "nothing"
        here = tuple(own[key].shape) if key in own else "nothing"
        raise UserError(
            f"{what} is of another network{checkpoint.trained_as}: {len(fatal)} of its tensors do not fit, '{key}' is "
            f"{there} there and {here} here; give the configuration it was trained with."
        )
    if bad:
        _logger.warning(
            f"{what}: {len(bad)} tensors outside the backbone do not fit and start anew, such as '{bad[0]}'"
        )


def _splits(name: str, dataset: Any) -> Iterator[Split]:
    """Data sets in COCO's format, inside of wrappers (repeated, balanced, concatenated), too."""
    inner = dataset.get("datasets") or ([dataset["dataset"]] if "dataset" in dataset else [])
    for each in inner:
        yield from _splits(name, each)
    if inner or not isinstance(dataset.get("ann_file"), str) or not dataset["ann_file"].endswith(".json"):
        return
    from mmdet.registry import DATASETS

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
    )


def _read(split: Split) -> dict[str, Any]:
    where = f"{split.name} data: '{split.annotations}'"
    try:
        content = json.loads(split.annotations.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}); give the data's folder as --cfg-options data_root=/path."
        ) from None
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({one_line(error)}); it is damaged or another file.") from None
    for key in NEEDED:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{where} has no list '{key}', which COCO's format asks for; give a COCO file.")
        for number, entry in enumerate(content[key]):
            _require(where, key, number, entry)
        _check_ids(where, key, content[key])
    if not content["images"]:
        raise UserError(f"{where} lists no images; there is nothing to {'train on' if split.training else 'measure'}.")
    return content


def _require(where: str, kind: str, number: int, entry: Any) -> None:
    """An entry has what COCO's format asks for, of the right type."""
    given = entry if isinstance(entry, dict) else {}
    for key in NEEDED[kind]:
        value = given.get(key)
        if key in NUMBERS:
            fits = _is_number(value)
        elif key in TEXTS:
            fits = isinstance(value, str)
        else:
            fits = isinstance(value, (int, str)) if key in IDS else value is not None
        if not fits:
            name = f"{WORDS[kind]} {f'number {number}' if given.get('id') is None else given['id']}"
            expected = "text" if key in TEXTS else "a number"
            problem = f"has no '{key}'" if value is None else f"has {key} {value!r}, expected {expected}"
            raise UserError(f"{where}: {name} {problem}; COCO's format asks for it, correct the file.")


def _check_ids(where: str, kind: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """No two entries share an id: pycocotools would keep the last one alone, and measure wrongly without a word."""
    twice = [each for each, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if twice:
        raise UserError(
            f"{where}: {len(twice)} ids stand for more than one {WORDS[kind]} ({_some(twice)}); COCO's format asks for "
            "different ones, number them anew."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_categories(split: Split, categories: Sequence[Mapping[str, Any]]) -> None:
    names = [str(category["name"]) for category in categories]
    missing = [name for name in split.classes if name not in names]
    where = f"{split.name} data: '{split.annotations}'"
    if missing:
        hint = did_you_mean(missing[0], names)
        raise UserError(
            f"{where} has the categories {_some(names)}, but the configuration expects '{missing[0]}'{hint}; set "
            "dataset.metainfo.classes and the heads' num_classes to the file's."
        )
    kept = [name for name in names if name in split.classes]
    if kept != list(split.classes) and split.classes:
        raise UserError(
            f"{where} lists its categories as {_some(kept)}, the configuration as {_some(split.classes)}: MMDetection "
            "numbers them by the file; set dataset.metainfo.classes in that order."
        )


def _check_annotations(split: Split, content: Mapping[str, Any]) -> Counter[Any]:
    """Warns of what is skipped; returns how many usable annotations each image has."""
    wanted = {category["id"]: category["name"] in split.classes for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    where = f"{split.name} data: '{split.annotations}'"
    usable: Counter[Any] = Counter()
    skipped: dict[str, list[Any]] = {}
    for each in content["annotations"]:
        name = each["id"]
        image, box = images.get(each["image_id"]), each["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise UserError(f"{where}: annotation {name} has bbox {box!r}, expected [x, y, width, height]; correct it.")
        if image is None:
            reason = "of an image that the file does not list"
        elif each["category_id"] not in wanted:
            reason = "of a category that the file does not list"
        elif split.classes and not wanted[each["category_id"]]:
            reason = "of a category that the configuration does not ask for"
        elif each["area"] <= 0 or box[2] < 1 or box[3] < 1 or _outside(box, image):
            reason = "with a box without area, or outside of its image"
        elif split.masks and not each.get("segmentation"):
            raise UserError(
                f"{where}: annotation {name} has no 'segmentation', but the pipeline loads masks (with_mask=True); "
                "give a file with masks, or train a detector of boxes."
            )
        else:
            usable[each["image_id"]] += 1
            continue
        skipped.setdefault(reason, []).append(name)
    for reason, names in skipped.items():
        _logger.warning(f"{where}: {len(names)} annotations {reason} are skipped (ids {_some(names)})")
    return usable


def _outside(box: Sequence[float], image: Mapping[str, Any]) -> bool:
    x, y, width, height = box
    return min(x + width, image["width"]) <= max(x, 0) or min(y + height, image["height"]) <= max(y, 0)


def _check_images(split: Split, images: Sequence[Mapping[str, Any]], usable: Mapping[Any, int]) -> None:
    where = f"{split.name} data: '{split.annotations}'"
    small = [image for image in images if min(image["width"], image["height"]) < max(split.min_size, 1)]
    gone = {image["id"] for image in small}
    others = [image for image in images if image["id"] not in gone]
    tiny = [image for image in others if min(image["width"], image["height"]) < CELL]
    empty = [image for image in others if split.filter_empty and not usable.get(image["id"])]
    if tiny:
        _logger.warning(
            f"{where}: {len(tiny)} images are smaller than one cell of the coarsest map ({CELL} pixels) and are "
            f"enlarged or padded ({_some([image['file_name'] for image in tiny])})"
        )
    if small:
        _logger.warning(
            f"{where}: {len(small)} images with a side under {split.min_size} pixels are skipped "
            f"({_some([image['file_name'] for image in small])})"
        )
    if empty:
        _logger.warning(f"{where}: {len(empty)} images without an object are skipped")
    if split.training and (len(small) + len(empty) == len(images) or not usable):
        raise UserError(f"{where} has no image with an object to train on; give another file or correct it.")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = [found for found in pool.map(_problem, (split.images / i["file_name"] for i in images)) if found]
    if problems:
        more = f", and {len(problems) - 1} more are missing or damaged" if len(problems) > 1 else ""
        raise UserError(f"{where}: {problems[0]}{more}; restore the files or remove them from the annotations.")


def _problem(path: Path) -> str:
    """What is wrong with an image file, without decoding it where its end shows that it is all there."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8))
            end = file.read()
    except OSError as error:
        return f"image '{path}' cannot be read ({error.strerror})"
    if (start[:2] == b"\xff\xd8" and end[-2:] == JPEG_END) or (start[1:4] == b"PNG" and end == PNG_END):
        return ""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        return f"image '{path}' is truncated or damaged ({one_line(error)})"
    return ""


def _evaluators(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _num_classes(value: Any, where: str) -> Iterator[tuple[int, str]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key == "num_classes" and re.search(r"(bbox|mask)_head(\[\d+\])?$", where):
                yield each, where
            yield from _num_classes(each, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _num_classes(each, f"{where}[{index}]")


def _some(values: Sequence[Any], count: int = 5) -> str:
    return ", ".join(str(value) for value in values[:count]) + (", ..." if len(values) > count else "")
