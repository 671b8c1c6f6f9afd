"""Configurations that come with the package, found by name: `revnets train --config quickstart`."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError, did_you_mean, shown


def find(text: str, ours: Path, suffix: str, origin: str) -> Path:
    """The file of this path or, where there is none, ours of this name.

    A name is the path within our folder (or, as in a checkout, within `configs/`), or its last part where only one file
    has it; the suffix may be left out. Folders with an underscore hold parts of others, which are no names.

    Args:
        text: Path or name.
        ours: Folder of our configurations.
        suffix: Of them.
        origin: Where it was given, for messages.

    Raises:
        UserError: There is neither, or several have the name.
    """
    path = os.path.expanduser(text)
    folder = os.path.isdir(path)  # of that name by chance, as that of the data set may be
    if os.path.lexists(path) and not folder:
        return Path(path)
    files = sorted(file for file in ours.rglob(f"*{suffix}") if not file.relative_to(ours).parts[0].startswith("_"))
    names = {file.relative_to(ours).with_suffix("").as_posix(): file for file in files}
    wanted = text.removesuffix(suffix).removeprefix(f"configs/{ours.name}/")
    found = [name for name in names if wanted in (name, name.rpartition("/")[2])]
    if len(found) == 1 or wanted in found:
        return names[wanted if wanted in found else found[0]]
    if folder and not found:
        return Path(path)  # its reader says what is wrong
    if found:
        raise UserError(f"{origin}: {shown(text)} is the name of several files: {', '.join(found)}; give one of these.")
    short = {name.rpartition("/")[2] for name in names}
    hint = did_you_mean(os.path.basename(wanted), sorted({*names, *short}))
    raise UserError(f"{origin}: there is no file '{text}'{hint}; '{ours}' has ours.")
