"""Pictures by matplotlib, where it is installed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .files import whole_file

_logger = logging.getLogger("revnets")


def new_figure(path: Path, size: tuple[float, float], instead: str = "") -> Any:
    """A figure of matplotlib; None, said in one line, where that is not installed.

    Args:
        path: Of the picture.
        size: Width and height in inches.
        instead: What else to say where there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _logger.info(f"no {path.name}: matplotlib is not installed (pip install matplotlib){instead}")
        return None
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 120) -> Path:
    """Writes the picture, whole or not at all, and returns its path."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    return path


def caption(text: str) -> str:
    r"""The text as matplotlib draws it letter by letter.

    It takes what stands between two dollars for a formula, and no text that is not Unicode, and fails in both; a
    training of days would end in that.

    Args:
        text: Of any letters, such as those of a folder's name.

    Example:
        >>> print(caption("run $x_$ \udcff"))
        run \$x_\$ ?
    """
    return text.encode(errors="replace").decode().replace("$", r"\$")
