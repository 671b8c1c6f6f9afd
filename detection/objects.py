"""Annotations against their images: which will not be trained on, and why; what cannot be meant, stops."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from revnets.training.errors import UserError

from .annotations import Split, check_box, check_mask, some

_logger = logging.getLogger("detection")
CELL = 32  # pixels of the coarsest map's cells, to which images are padded
Entry = Mapping[str, Any]


def check_objects(split: Split, content: Mapping[str, Any]) -> None:
    """Counts and names annotations and images that training will not see, with the reason.

    Args:
        split: The data set.
        content: Of its file, with sizes as `check_sizes` gives them.

    Raises:
        UserError: A box or mask that is none, or nothing to train or to measure on.
    """
    usable, crowds, skipped = _sorted(split, content)
    for reason, names in skipped.items():
        _logger.warning(f"{split.where}: {len(names)} annotations {reason} are skipped (ids {some(names)})")
    images = content["images"]
    twice = [name for name, count in Counter(image["file_name"] for image in images).items() if count > 1]
    if twice:
        _logger.warning(f"{split.where}: {len(twice)} image files are listed more than once ({some(twice)})")
    seen = _check_images(split, content, usable, crowds)
    why = "; ".join(f"{len(names)} annotations {reason}" for reason, names in skipped.items())
    why = f" ({why})" if why else ""
    if split.training and not any(usable.get(image["id"]) for image in seen):
        raise UserError(f"{split.where} has no image with an object to train on{why}; give another file or correct it.")
    if split.measures and not usable:
        raise UserError(f"{split.where} has no object to measure on{why}; give another file or correct it.")


def _sorted(split: Split, content: Mapping[str, Any]) -> tuple[Counter[Any], Counter[Any], dict[str, list[Any]]]:
    """How many usable annotations and crowds images have, and ids of those that are skipped, by reason."""
    wanted = {category["id"]: category["name"] in split.classes for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    usable, crowds = Counter[Any](), Counter[Any]()
    skipped: dict[str, list[Any]] = {}
    beyond: list[Entry] = []
    for each in content["annotations"]:
        check_box(split.where, each)
        image, box = images.get(each["image_id"]), each["bbox"]
        if image is not None and image["unturned"] and _beyond(box, image):
            raise UserError(
                f"{split.where}: annotation {each['id']} reaches out of '{image['file_name']}' as it is turned by its "
                "EXIF data; boxes are of the image before that: turn the file itself, or set LoadImageFromFile's "
                "color_type='color_ignore_orientation'."
            )
        if image is None:
            reason = "of an image that the file does not list"
        elif each["category_id"] not in wanted:
            reason = "of a category that the file does not list"
        elif split.classes and not wanted[each["category_id"]]:
            reason = "of a category that the configuration does not ask for"
        elif unseen := _unseen(each, image):
            reason = unseen
        elif each.get("ignore"):
            reason = "marked 'ignore'"
        else:
            if split.masks:
                check_mask(split.where, each, (image["width"], image["height"]))
            if _beyond(box, image):
                beyond.append(each)
            usable[each["image_id"]] += 1
            crowds[each["image_id"]] += bool(each.get("iscrowd"))
            continue
        skipped.setdefault(reason, []).append(each["id"])
    _warn_of_beyond(split, beyond, sum(usable.values()))
    return usable, crowds, skipped


def _unseen(each: Entry, image: Entry) -> str:
    """Why MMDetection leaves an annotation out for its numbers, or nothing."""
    x, y, width, height = each["bbox"]
    if width < 1 or height < 1:
        return "with a box narrower or lower than one pixel"
    if min(x + width, image["width"]) <= max(x, 0) or min(y + height, image["height"]) <= max(y, 0):
        return "with a box outside of its image"
    if each["area"] <= 0:
        return "with an 'area' of 0 or less, though their boxes have one (write the object's, or width x height)"
    return ""


def _beyond(box: Sequence[float], image: Entry) -> bool:
    x, y, width, height = box
    return x + width > image["width"] + 1 or y + height > image["height"] + 1 or min(x, y) < -1


def _warn_of_beyond(split: Split, beyond: Sequence[Entry], total: int) -> None:
    """Boxes that reach out of their images: a few are cut off, but many show that coordinates mean something else."""
    corners = [each for each in beyond if each["bbox"][2] > each["bbox"][0] and each["bbox"][3] > each["bbox"][1]]
    if beyond:
        hint = "; are they [x1, y1, x2, y2]?" if 2 * len(corners) > total else ""
        _logger.warning(
            f"{split.where}: {len(beyond)} boxes reach out of their images (ids "
            f"{some([each['id'] for each in beyond])}){hint}"
        )


def _check_images(
    split: Split, content: Mapping[str, Any], usable: Mapping[Any, int], crowds: Mapping[Any, int]
) -> list[Entry]:
    """Says which images are skipped, and why; returns those that are not."""
    images = content["images"]
    small = [image for image in images if min(image["width"], image["height"]) < max(split.min_size, 1)]
    gone = {image["id"] for image in small}
    others = [image for image in images if image["id"] not in gone]
    tiny = [image for image in others if min(image["width"], image["height"]) < CELL]
    if tiny:
        _logger.warning(
            f"{split.where}: {len(tiny)} images are smaller than one cell of the coarsest map ({CELL} pixels) and are "
            f"enlarged or padded ({_names(tiny)})"
        )
    if small:
        _logger.warning(
            f"{split.where}: {len(small)} images with a side under {split.min_size} pixels are skipped "
            f"({_names(small)})"
        )
    if not split.training:
        return others
    empty = [image for image in others if not usable.get(image["id"])]
    if empty:
        annotated = {each["image_id"] for each in content["annotations"]}
        bare = [image for image in empty if image["id"] not in annotated]
        useless = [image for image in empty if image["id"] in annotated]
        reasons = [f"{len(bare)} have no annotation: {_names(bare)}"] if bare else []
        reasons += [f"{len(useless)} none that can be used: {_names(useless)}"] if useless else []
        what = "are skipped" if split.filter_empty else "are trained on, as background"
        _logger.warning(f"{split.where}: {len(empty)} images without an object {what} ({'; '.join(reasons)})")
    only = [image for image in others if 0 < usable.get(image["id"], 0) == crowds.get(image["id"], 0)]
    if only:
        _logger.warning(f"{split.where}: {len(only)} images have crowds alone, no object to learn ({_names(only)})")
    return [image for image in others if usable.get(image["id"])] if split.filter_empty else others


def _names(images: Sequence[Entry]) -> str:
    return some([image["file_name"] for image in images])
