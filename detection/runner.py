"""MMEngine's runner, quiet in the terminal, with what runs here have besides: whole checkpoints, progress, memory."""

from __future__ import annotations

import logging
import sys
from typing import Any

from mmengine.runner import Runner

from classification.errors import UserError, one_line
from classification.runtime import start_logging
from detection.config import primary
from detection.noise import noise_kept_out

BUILDING = (KeyError, TypeError, ValueError, AttributeError, ImportError, OSError, AssertionError)


class QuietRunner(Runner):
    """Writes its log to a file only; warnings go to the terminal, too."""

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        """MMEngine's logger, with less in the terminal."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setStream(sys.stderr)  # stdout is closed to what libraries print
                handler.setLevel(max(handler.level, logging.WARNING))
                handler.addFilter(_of_interest)
        return logger


def build(cfg: Any, verbose: bool) -> Runner:
    """The runner of a configuration.

    Args:
        cfg: The configuration.
        verbose: MMEngine's whole log in the terminal.

    Raises:
        UserError: The configuration asks for what is not there.
    """
    start_logging(primary())
    with noise_kept_out(verbose):
        try:
            return (Runner if verbose else QuietRunner).from_cfg(cfg)
        except BUILDING as error:
            words = one_line(error)
            raise UserError(f"CONFIG: '{cfg.filename}' cannot be built ({words}); correct it.") from error


def _of_interest(record: logging.LogRecord) -> bool:
    """MMEngine warns of its own use of its older names."""
    text = record.getMessage()
    return not any(word in text for word in ("FileClient", "HardDiskBackend", "is not a meta file", "simply pass"))
