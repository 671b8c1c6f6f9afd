"""Finds and reads checkpoints of MMEngine's runner, safely, and checks that they are of the network at hand."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from classification.checkpoints import first_whole
from revnets.training.errors import UserError, one_line
from revnets.training.held import RUNNER, WEIGHTS
from revnets.training.integrity import damage, forbidden, is_archive
from revnets.training.reading import refused
from revnets.training.tree import sound

_logger = logging.getLogger("detection")
LAST = "last_checkpoint"


def newest(folder: Path) -> Path | None:
    """The checkpoint that a run saved last, where there is one."""
    try:
        path = Path((folder / LAST).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None
    for candidate in (path, folder / path.name):  # the folder may have been moved
        if candidate.is_file():
            return candidate
    return None


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint to go on from: the newest that is whole and can be read; damaged ones are warned of.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    if not (folder / LAST).exists():
        return None
    files = sorted(_of_run(folder), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    last = newest(folder)
    return first_whole(list(dict.fromkeys([last, *files] if last is not None else files)), folder, read)


def _of_run(folder: Path) -> list[Path]:
    return [path for pattern in ("epoch_*.pth", "iter_*.pth", "interim.pth") for path in folder.glob(pattern)]


def forget(folder: Path, kept: str | None) -> None:
    """Removes what a killed run would be resumed from, except a file that is still to be loaded; best ones stay."""
    for path in [folder / LAST, *_of_run(folder)]:
        if kept is None or Path(kept).resolve() != path.resolve():
            path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights, and what else is known of them."""

    what: str  # option and file, for messages
    state: dict[str, Any]
    resumable: bool
    trained_as: str  # what it says of its backbone, as an addition to a sentence


def read(path: str | Path, option: str) -> Checkpoint:
    """A checkpoint, mapped rather than read into memory where its format (torch's since 1.6) allows.

    Args:
        path: The file.
        option: That named it, for messages.

    Raises:
        UserError: No such file, a damaged one, or one that holds more than data.
    """
    from mmengine.runner.checkpoint import get_torch_safe_globals

    what = f"{option}: '{path}'"
    if not Path(path).is_file():
        raise UserError(f"{what} does not exist; give a checkpoint, such as epoch_12.pth in the folder of a run.")
    problem = damage(path) if is_archive(path) else ""
    if problem:
        raise UserError(f"{what} is damaged: {problem}; give another file.")
    try:
        with torch.serialization.safe_globals(get_torch_safe_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive(path))
    except pickle.UnpicklingError as error:
        if code := forbidden(error):
            raise UserError(
                f"{what} holds more than weights: reading it would run '{code}'; give another file."
            ) from error
        raise UserError(
            f"{what} is damaged, or holds more than weights, which might run code ({one_line(error)[:120]}); give "
            "another file."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{what} is damaged or no checkpoint ({one_line(error)[:120]}); give another file.") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{what} holds no weights; give a checkpoint of MMDetection.")
    with refused(path, option):
        sound(content)
        WEIGHTS.check(state, ("state_dict",) if "state_dict" in content else ())
        if option == "--resume" and "optimizer" in content and "message_hub" in content:  # a runner wrote it
            RUNNER.check(content)
    weights = {key.removeprefix("module."): value for key, value in state.items()}
    return Checkpoint(what, weights, "optimizer" in content, _trained_as(content))


def _trained_as(content: dict[str, Any]) -> str:
    text = (content.get("meta") or {}).get("cfg")
    if not isinstance(text, str):
        return ""
    from mmengine.config import Config

    try:
        backbone = Config.fromstring(text, file_format=".py").model.backbone
    except Exception:  # what it says is a help, no more
        return ""
    parts = [str(backbone[key]) for key in ("type", "model_name", "arch", "depth") if key in backbone]
    return f" ({' '.join(parts)})"
