"""Writes scikit-learn's handwritten digits (1,797 real scans, bundled with it) as a timm-readable folder of images.

python -m classification.digits --data-dir output/digits --size 32
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path, see train.py
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "classification"

from PIL import Image

from revnets.training.data.digits import digit_scans, grey, make_once
from revnets.training.errors import guarded
from revnets.training.options.parsing import SEED, option, parse

MARKER = "digits.json"


@dataclasses.dataclass
class DigitsOptions:
    """Digits"""

    data_dir: str = option("output/digits", "folder to make", path=True)
    size: int = option(32, "height and width of the images", low=8, high=4096)
    seed: int = option(42, "of the split", low=0, high=SEED)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 2 after a user mistake."""

    def run() -> None:
        options = parse(DigitsOptions, argv, "Write scikit-learn's digits as class folders.")
        root = make_digits(Path(options.data_dir), options.size, options.seed)
        print(f"digits of {options.size}x{options.size} pixels are in '{root}': train and validation, ten folders each")

    return guarded(run)


def make_digits(root: Path, size: int = 32, seed: int = 42, limit: int | None = None) -> Path:
    """Makes `root/train/<digit>/*.png` and `root/validation/<digit>/*.png`: 1,437 and 360 images, split by class.

    The folder appears complete or not at all. If it is already there with the same settings, nothing is done.

    Args:
        root: The folder to make.
        size: Height and width; the 8x8 scans are resized bicubically and turned into RGB.
        seed: Of the split.
        limit: Keep only so many images per split (for quick tests).

    Returns:
        `root`.

    Raises:
        UserError: scikit-learn is missing, or the folder holds something else.
    """

    def fill(folder: Path) -> None:
        for split, (scans, labels) in digit_scans(seed).items():
            for index, (scan, label) in enumerate(list(zip(scans, labels, strict=True))[:limit]):
                path = folder / split / str(label) / f"{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                grey(scan).resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(path)

    return make_once(root, "digits", MARKER, {"size": size, "seed": seed, "limit": limit}, fill)


if __name__ == "__main__":
    sys.exit(main())
