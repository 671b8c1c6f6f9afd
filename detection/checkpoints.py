"""Finds and reads checkpoints of MMEngine's runner, safely, and checks that they are of the network at hand."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from revnets.training.checkpoints.held import RUNNER, WEIGHTS
from revnets.training.checkpoints.integrity import first_whole
from revnets.training.checkpoints.reading import in_file, named, read_file
from revnets.training.errors import UserError
from revnets.training.files import named_file, remove_all

LAST = "last_checkpoint"
WRITTEN = (LAST, "summary.json", "predictions.png", "memory.json")
_SAVED, _BEST = re.compile(r"(epoch|iter)_\d+\.pth|interim\.pth"), re.compile(r"best_.+\.pth")
_BACKBONE = re.compile(r"(?<=\bbackbone=)dict\([\s\S]{0,2000}")  # in a config; short, so that it cannot be deep
_NAMES = ("type", "model_name", "arch", "depth")  # of a backbone, in its config


def writes(name: str) -> bool:
    """Whether a run writes a file of that name."""
    return name in WRITTEN or _SAVED.fullmatch(name) is not None or _BEST.fullmatch(name) is not None


def newest(folder: Path, saved: Path | None = None) -> Path | None:
    """The checkpoint that a run saved last, where there is one.

    Args:
        folder: Of the run; what its `last_checkpoint` says is the name of a file in the folder of checkpoints.
        saved: The folder of checkpoints, where it is another.
    """
    try:
        with (folder / LAST).open(encoding="utf-8") as file:
            return named_file(saved or folder, file.read(1 << 14))
    except (OSError, ValueError):
        return None


def newest_whole(folder: Path, saved: Path | None = None) -> Path | None:
    """The checkpoint to go on from: the newest that is whole and can be read; damaged ones are warned of.

    Args:
        folder: Of the run.
        saved: The folder of checkpoints, where it is another.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    if not (folder / LAST).exists():
        return None
    files = sorted(_of_run(saved or folder), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    last = newest(folder, saved)
    return first_whole(list(dict.fromkeys([last, *files] if last is not None else files)), folder, _content)


def _of_run(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.pth") if _SAVED.fullmatch(path.name) and path.is_file()]


def forget(folder: Path, kept: str | None) -> None:
    """Removes what a killed run would be resumed from, except a file that is still to be loaded; best ones stay.

    Raises:
        UserError: A file cannot be deleted; all are still there.
    """
    loaded = kept and os.path.realpath(kept)
    try:
        remove_all([path for path in (folder / LAST, *_of_run(folder)) if os.path.realpath(path) != loaded])
    except OSError as error:
        raise UserError(
            f"--overwrite: '{error.filename}' cannot be deleted ({error.strerror}); delete it or give another "
            "--work-dir."
        ) from error


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights, and what else is known of them."""

    what: str  # option and file, for messages
    state: dict[str, Any]
    trained_as: str  # what it says of its backbone, as an addition to a sentence


def read(path: str | Path, option: str, resumed: bool = False) -> Checkpoint:
    """A checkpoint, mapped rather than read into memory where its format (torch's since 1.6) allows.

    Args:
        path: The file.
        option: That named it, for messages.
        resumed: Whether a run goes on from it, so that it must hold all that a runner needs.

    Raises:
        UserError: No such file, a damaged one, one that holds more than data, no weights, or an odd entry.
    """
    content = _content(path, option)
    state = content.get("state_dict", content)
    with in_file(path, option):
        if resumed and "optimizer" in content:
            RUNNER.check(content)
        else:
            WEIGHTS.check(state, ("state_dict",) if "state_dict" in content else ())
    if resumed and "optimizer" not in content:
        raise UserError(
            f"{option}: '{path}' holds weights alone, no optimizer; give a checkpoint of a run, or start from its "
            f"weights with --cfg-options load_from={path}."
        )
    weights = {key.removeprefix("module."): value for key, value in state.items()}
    return Checkpoint(named(path, option), weights, _trained_as(content))


def _content(path: str | Path, option: str) -> dict[str, Any]:
    """What a file of MMEngine's holds, as data, whatever the values are."""
    from revnets.mm.loading import safe_globals

    return read_file(path, option, safe_globals(), mmap=True)


def _trained_as(content: dict[str, Any]) -> str:
    """What a checkpoint says of its backbone: a help in messages, so whatever is odd gives nothing.

    It is text in the form of Python source. It is read, and never run: a checkpoint's words are anybody's.
    """
    meta = content.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    found = _BACKBONE.search(text) if isinstance(text, str) else None
    if found is None:
        return ""
    try:
        call = ast.parse(_balanced(found[0]), mode="eval").body
        backbone = {keyword.arg: keyword.value for keyword in call.keywords} if isinstance(call, ast.Call) else {}
        parts = [ast.literal_eval(backbone[key]) for key in _NAMES if key in backbone]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return ""
    words = [str(part)[:60] for part in parts if isinstance(part, (str, int))]
    return f" ({' '.join(' '.join(words).split())})" if words else ""


def _balanced(text: str) -> str:
    """A call, up to the bracket that closes it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and letter == ")":
            return text[: place + 1]
    return ""
