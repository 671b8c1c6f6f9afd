"""The log of a script."""

from __future__ import annotations

import logging


def start_logging(primary: bool) -> None:
    """The log on stderr, of one process; the others only report errors."""
    if not logging.root.handlers:
        from timm.utils import setup_default_logging

        setup_default_logging()
    logging.root.setLevel(logging.INFO if primary else logging.ERROR)
    for noisy in ("matplotlib", "PIL", "timm.utils.checkpoint_saver", "timm.models._builder"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
