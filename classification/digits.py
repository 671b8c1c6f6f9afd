"""Writes scikit-learn's handwritten digits (1,797 real scans, bundled with it) as a timm-readable folder of images.

python -m classification.digits --data-dir output/digits --size 32
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path, see train.py
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "classification"

import numpy as np
from PIL import Image

from revnets.training.data.digits import digit_scans
from revnets.training.errors import UserError, guarded
from revnets.training.files import whole_folder
from revnets.training.options.option import option
from revnets.training.options.parsing import SEED, parse

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
        options = parse(DigitsOptions, argv, "Write scikit-learn's digits as class folders.", prog="digits.py")
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
    settings = {"size": size, "seed": seed, "limit": limit}
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if _marker(root) == settings:
            return root
        raise UserError(
            f"--data-dir: '{root}' holds other files than digits with {settings}; delete it or give another folder."
        )
    with whole_folder(root) as temporary:
        for split, (scans, labels) in digit_scans(seed).items():
            for index, (scan, label) in enumerate(list(zip(scans, labels, strict=True))[:limit]):
                _write(temporary / split / str(label) / f"{index:04d}.png", scan, size)
        (temporary / MARKER).write_text(json.dumps(settings), encoding="utf-8")
    return root


def _marker(root: Path) -> object:
    try:
        return json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, scan: np.ndarray, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))  # the scans count ink from 0 to 16
    grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(path)


if __name__ == "__main__":
    sys.exit(main())
