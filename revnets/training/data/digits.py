"""The 1,797 handwritten digits that come with scikit-learn: real scans, what examples and quickstarts train on."""

from __future__ import annotations

import numpy as np

from ..errors import UserError

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
