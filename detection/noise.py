"""Keeps what libraries print out of the terminal."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def noise_kept_out(verbose: bool) -> Iterator[None]:
    """Inside, what libraries print is dropped, unless it was asked for."""
    if verbose:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
