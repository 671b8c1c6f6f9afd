"""Pictures by matplotlib, where it is installed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import whole_file

_logger = logging.getLogger("revnets")


def picture(
    path: Path,
    size: tuple[float, float],
    paint: Callable[[Any], object],
    title: str = "",
    instead: str = "",
    dpi: int = 120,
) -> Path | None:
    """A picture as a PNG file, whole or not at all.

    Args:
        path: Of the file.
        size: Width and height in inches.
        paint: Draws on the figure.
        title: Above it.
        instead: What else to say where there is no matplotlib.
        dpi: Pixels per inch.

    Returns:
        The path, or None, said in one line, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _logger.warning(f"no {path.name}: matplotlib is not installed (pip install matplotlib){instead}")
        return None
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title)
    paint(figure)
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
