"""The 1,797 handwritten digits that come with scikit-learn: real scans, what examples and quickstarts train on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import whole_folder

HELD_OUT = 360


def digit_scans(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The scans `(count, 8, 8)`, ink from 0 to 16, and their digits `(count,)`, as `train` and `validation`.

    Args:
        seed: Of the split.

    Raises:
        UserError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError("scikit-learn is not installed; it brings the digits: pip install scikit-learn") from error
    digits = load_digits()
    parts = train_test_split(
        digits.images, digits.target, test_size=HELD_OUT, stratify=digits.target, shuffle=True, random_state=seed
    )
    return {"train": (parts[0], parts[2]), "validation": (parts[1], parts[3])}


def grey(scan: np.ndarray) -> Image.Image:
    """A scan as a picture: white ink on black."""
    return Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))


def make_once(root: Path, what: str, marker: str, settings: Mapping[str, object], fill: Callable[[Path], None]) -> Path:
    """Makes a folder whose files follow from its settings, complete or not at all; nothing where it is there already.

    Args:
        root: The folder to make, of `--data-dir`.
        what: Is in it, for the message.
        marker: Name of the file in it that holds the settings.
        settings: Plain values.
        fill: Fills an empty folder.

    Returns:
        `root`.

    Raises:
        UserError: It holds something else.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        with suppress(OSError, ValueError):
            if json.loads((root / marker).read_text(encoding="utf-8")) == settings:
                return root
        raise UserError(
            f"--data-dir: '{root}' holds other files than {what} with {settings}; delete it or give another folder."
        )
    with whole_folder(root) as temporary:
        fill(temporary)
        (temporary / marker).write_text(json.dumps(settings), encoding="utf-8")
    return root
