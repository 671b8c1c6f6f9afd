"""Composes scikit-learn's handwritten digits (1,797 real scans, bundled with it) into scenes in COCO's format.

python -m detection.digits --data-dir data/digits-scenes
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, see train.py
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "detection"

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from revnets.training.data.digits import digit_scans, grey, make_once
from revnets.training.errors import UserError, guarded
from revnets.training.options.parsing import SEED, Parser, argument

MARKER = "scenes.json"
CLASSES = tuple(str(digit) for digit in range(10))
HELD_BACK = 200  # training scans that only validation scenes show
SIDE = (18, 40)  # pixels of a scan, before its empty border is cut off
DIGITS = (4, 12)  # tried per scene
OVERLAP = 0.05  # most that two boxes share of the smaller one
INK = 0.3  # opacity from which a pixel belongs to the digit


@dataclasses.dataclass(frozen=True)
class SceneOptions:
    """What a folder of scenes is made of; two folders with the same values hold the same files."""

    train: int = 800
    val: int = 100
    test: int = 200
    size: int = 128
    seed: int = 42


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 2 after a user mistake."""

    def run() -> None:
        parser = Parser(description="Compose digits into scenes in COCO's format.")
        path = argument(str, path=True)
        parser.add_argument("--data-dir", type=path, default="data/digits-scenes", help="folder to make")
        for field in dataclasses.fields(SceneOptions):
            number = argument(int, low=0, high=SEED if field.name == "seed" else 100_000)
            parser.add_argument(f"--{field.name}", type=number, default=field.default, help=f"default: {field.default}")
        values = vars(parser.parse_args(argv))
        root = make_scenes(Path(values.pop("data_dir")), SceneOptions(**values))
        print(f"scenes with digits are in '{root}': train, val and test, each a folder of images and a COCO file")

    return guarded(run)


def make_scenes(root: Path, options: SceneOptions | None = None) -> Path:
    """Makes `root/<split>/*.png` and `root/<split>.json` for train, val and test, with boxes and masks.

    No scan is shown in two splits. The folder appears complete or not at all. If it is already there with the same
    settings, nothing is done.

    Args:
        root: The folder to make.
        options: Number of scenes, their size, the seed.

    Returns:
        `root`.

    Raises:
        UserError: scikit-learn is missing, a number is too small, or the folder holds something else.
    """
    options = options or SceneOptions()
    settings = dataclasses.asdict(options)
    if options.size < 2 * SIDE[1] or min(options.train, options.val, options.test) < 1 or options.seed < 0:
        raise UserError(f"scenes of {settings}: expected at least one per split, of {2 * SIDE[1]} or more pixels.")

    def fill(folder: Path) -> None:
        for number, (split, scans, labels) in enumerate(_splits(options.seed)):
            (folder / split).mkdir()
            coco = _write_split(folder / split, getattr(options, split), scans, labels, options, number)
            (folder / f"{split}.json").write_text(json.dumps(coco), encoding="utf-8")

    return make_once(root, "scenes", MARKER, settings, fill)


def _splits(seed: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The classification's split, with the end of its training part for validation."""
    parts = digit_scans(seed)
    scans, labels = parts["train"]
    yield "train", scans[:-HELD_BACK], labels[:-HELD_BACK]
    yield "val", scans[-HELD_BACK:], labels[-HELD_BACK:]
    yield "test", *parts["validation"]


def _write_split(
    folder: Path, count: int, scans: np.ndarray, labels: np.ndarray, options: SceneOptions, number: int
) -> dict[str, Any]:
    """Writes the images of a split; returns its COCO file."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        random = np.random.default_rng([options.seed, number, index])
        picture, found = _scene(random, scans, labels, options.size)
        name = f"{index:05d}.png"
        picture.save(folder / name)
        images.append({"id": index + 1, "file_name": name, "width": options.size, "height": options.size})
        for each in found:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0, **each})
    categories = [{"id": digit + 1, "name": name} for digit, name in enumerate(CLASSES)]
    info = {"description": "scikit-learn's handwritten digits, composed into scenes", "version": "1"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _scene(
    random: np.random.Generator, scans: np.ndarray, labels: np.ndarray, size: int
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """A picture `(size, size)` and what COCO wants to know of each digit on it."""
    ground = random.uniform(0, 255, 3)
    picture = _background(random, size, ground)
    boxes: list[tuple[int, int, int, int]] = []
    found = []
    for _ in range(random.integers(DIGITS[0], DIGITS[1] + 1)):
        which = int(random.integers(len(scans)))
        opacity = _cut_out(scans[which], int(random.integers(SIDE[0], SIDE[1] + 1)))
        height, width = opacity.shape
        left, top = (int(random.integers(size - length + 1)) for length in (width, height))
        box = (left, top, width, height)
        ink = _contrasting(random, ground)
        if any(_shared(box, other) > OVERLAP for other in boxes):
            continue
        boxes.append(box)
        area = picture[top : top + height, left : left + width]
        area += opacity[..., None] * (ink - area)
        mask = np.zeros((size, size), bool)
        mask[top : top + height, left : left + width] = opacity >= INK
        found.append(
            {
                "category_id": int(labels[which]) + 1,
                "bbox": [float(value) for value in box],
                "area": int(mask.sum()),
                "segmentation": {"size": [size, size], "counts": _run_lengths(mask)},
            }
        )
    picture += random.normal(0, random.uniform(0, 12), picture.shape)
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8)), found


def _background(random: np.random.Generator, size: int, ground: np.ndarray) -> np.ndarray:
    """A colour with a gradient and blurred strokes over it, `(size, size, 3)`."""
    image = Image.fromarray(np.broadcast_to(np.rint(ground).astype(np.uint8), (size, size, 3)).copy())
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(3, 9)):
        line = [int(value) for value in random.integers(0, size, 4)]
        colour = tuple(int(value) for value in np.clip(ground + random.uniform(-60, 60, 3), 0, 255))
        if random.random() < 0.5:
            draw.line(line, fill=colour, width=int(random.integers(1, 5)))
        else:
            draw.rectangle([*np.minimum(line[:2], line[2:]), *np.maximum(line[:2], line[2:])], outline=colour)
    picture = np.asarray(image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 2)))).astype(float)
    across, down = random.uniform(-40, 40, 2)
    ramp = np.linspace(-0.5, 0.5, size)
    return picture + (across * ramp[None, :, None] + down * ramp[:, None, None])


def _contrasting(random: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """A colour that is clearly darker or lighter than the ground."""
    dark = ground.mean() > 127
    return random.uniform(0, 70, 3) if dark else random.uniform(185, 255, 3)


def _cut_out(scan: np.ndarray, side: int) -> np.ndarray:
    """Opacity `(h, w)` of a scan enlarged to `side`, without its empty border."""
    opacity = np.asarray(grey(scan).resize((side, side), Image.Resampling.BICUBIC)) / 255
    rows, columns = (np.flatnonzero((opacity >= INK).any(axis)) for axis in (1, 0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """The common area, as a share of the smaller box."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height) / min(a[2] * a[3], b[2] * b[3])


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, counts of 0, 1, 0, ..."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


if __name__ == "__main__":
    sys.exit(main())
