"""Pictures by matplotlib, where it is installed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .files import whole_file

_logger = logging.getLogger("revnets")


def new_figure(path: Path, size: tuple[float, float]) -> Any:
    """A figure of matplotlib for a picture; None, and a line that says so, where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _logger.info(f"no {path.name}: matplotlib is not installed (pip install matplotlib)")
        return None
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Writes the picture, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
