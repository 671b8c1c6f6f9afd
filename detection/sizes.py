"""Image files against their annotations: all there, whole, and of the size that the boxes are meant for."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from revnets.training.errors import UserError, one_line

from .annotations import Split, some

_logger = logging.getLogger("detection")
JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is of an image file."""

    problem: str = ""
    size: tuple[int, int] = (0, 0)  # as training sees it
    stored: tuple[int, int] = (0, 0)  # before it is turned as its EXIF data say


def check_sizes(split: Split, images: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Opens all image files, and compares their sizes with those of the annotations.

    Sizes that are none (-1, 0, missing, text) are those of the files, for training and measuring, too.

    Args:
        split: The data set.
        images: Entries of its file.

    Returns:
        The entries with sizes as training sees them, and `unturned` for those whose annotations give the size before
        it is turned as its EXIF data say.

    Raises:
        UserError: A file is missing or damaged, or of another size than its annotations say.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda image: look(split.images / image["file_name"], split.turned), images))
    problems = [each.problem for each in found if each.problem]
    if problems:
        more = f", and {len(problems) - 1} more are missing or damaged" if len(problems) > 1 else ""
        raise UserError(f"{split.where}: {problems[0]}{more}; restore the files or remove them from the annotations.")
    return list(_compared(split, images, found))


def look(path: Path, turned: bool) -> Found:
    """What is wrong with an image file, without decoding it where its end shows that it is all there; and its size.

    Args:
        path: Of the file.
        turned: Whether training turns it as its EXIF data say.
    """
    from revnets.mm.coco import file_size

    try:
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8))
            end = file.read()
    except OSError as error:
        return Found(f"image '{path}' cannot be read ({error.strerror})")
    whole = (start[:2] == b"\xff\xd8" and end[-2:] == JPEG_END) or (start[1:4] == b"PNG" and end == PNG_END)
    try:
        if not whole:
            with Image.open(path) as image:
                image.load()
        upright, stored = file_size(path)
    except UNREADABLE as error:
        return Found(f"image '{path}' is truncated or damaged ({one_line(error)})")
    return Found("", upright if turned else stored, stored)


def _compared(split: Split, images: Sequence[Mapping[str, Any]], found: Sequence[Found]) -> Iterator[dict[str, Any]]:
    from revnets.mm.coco import has_sizes

    unknown: list[Mapping[str, Any]] = []
    unturned: list[Mapping[str, Any]] = []
    near: list[tuple[Mapping[str, Any], Found]] = []
    wrong: list[tuple[Mapping[str, Any], Found]] = []
    for image, file in zip(images, found, strict=True):
        declared = (image.get("width"), image.get("height"))
        entry = {**image, "width": file.size[0], "height": file.size[1], "unturned": False}
        if not has_sizes(image):
            unknown.append(image)
        elif declared != file.size and declared == file.stored:
            unturned.append(image)
            entry["unturned"] = True
        elif declared != file.size:
            close = abs(image["width"] - file.size[0]) <= 1 and abs(image["height"] - file.size[1]) <= 1
            (near if close else wrong).append((image, file))
        yield entry
    if unknown and not split.measured:
        sides = " x ".join(repr(unknown[0].get(key)) for key in ("width", "height"))
        raise UserError(
            f"{split.where}: image {unknown[0]['id']} has 'width' and 'height' {sides}, which is no size, and "
            f"{split.kind} reads none from the file; correct the annotations ({len(unknown)} such images)."
        )
    if wrong:
        image, file = wrong[0]
        sizes = f"{image['width']} x {image['height']} in the annotations, {file.size[0]} x {file.size[1]} in the file"
        how = "exchanged" if (image["height"], image["width"]) == file.size else "another size"
        raise UserError(
            f"{split.where}: image '{image['file_name']}' is {sizes} ({how}; {len(wrong)} such images), so boxes would "
            "be at a wrong place or scale; give the images that were annotated, or correct the annotations."
        )
    for what, names in (
        ("have no size in the annotations, that of the file is used", unknown),
        ("differ from their files by one pixel, which is used", [image for image, _ in near]),
        ("are turned by their EXIF data, but not in the annotations' sizes: look whether boxes are right", unturned),
    ):
        if names:
            _logger.warning(f"{split.where}: {len(names)} images {what} ({some([i['file_name'] for i in names])})")
