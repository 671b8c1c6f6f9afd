"""Reading checkpoints of any origin: as plain tensors and values, whole, and of the shape that they must have."""

import json
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, one_line
from .held import WEIGHTS_FILE
from .integrity import damage, forbidden, is_archive, refusal
from .schema import Kind
from .tree import Mismatch, sound


class CheckpointError(UserError, ValueError):
    """A file that cannot be used; the message names it, the entry, and the fix."""


def named(path: str | Path, option: str = "") -> str:
    """A file as messages name it, after the option that it came from."""
    return f"{option}: '{path}'" if option else f"'{path}'"


def read_checkpoint(path: str | Path, option: str = "") -> dict[str, Any]:
    """A checkpoint of a training or of timm, bare or published weights, or safetensors; its weights are looked at.

    Args:
        path: The file.
        option: That named it, for messages.

    Returns:
        Its entries; bare weights come under ``state_dict``.

    Raises:
        CheckpointError: It is missing, damaged, holds more than data, or values that no checkpoint has.

    Example:
        >>> read_checkpoint("a.pth", "--resume")
        Traceback (most recent call last):
        revnets.training.checkpoints.reading.CheckpointError: --resume: there is no file 'a.pth'; give an existing checkpoint.
    """  # noqa: E501
    content = read_file(path, option)
    if "state_dict" not in content:
        content = {**content, "state_dict": content["model"]} if "model" in content else {"state_dict": content}
    with in_file(path, option):
        WEIGHTS_FILE.check(content)
    return content


def read_file(
    path: str | Path,
    option: str = "",
    safe: Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]] = (Namespace,),
    mmap: bool = False,
) -> dict[str, Any]:
    """What a file holds, as plain tensors and values (``weights_only=True``); the entries are the caller's to check.

    Args:
        path: A file of ``torch.save``, or ``.safetensors``.
        option: That named it, for messages.
        safe: Further classes that may be in it, as of ``torch.serialization.safe_globals``; timm keeps its options in
            a ``Namespace``.
        mmap: Map it rather than read it into memory, where its format (torch's since 1.6) allows.

    Raises:
        CheckpointError: It is missing, damaged, or holds more than data.
    """
    path, what = Path(path), named(path, option)
    if not _is_file(path):
        lead = f"{option}: " if option else ""
        raise CheckpointError(f"{lead}there is no file '{path}'; give an existing checkpoint.")
    problem = damage(path) if is_archive(path) else ""
    if problem:
        raise CheckpointError(f"{what} cannot be read as a checkpoint: {problem}; give another one.")
    try:
        if path.suffix == ".safetensors":
            content: Any = _read_safetensors(path)
        else:
            with torch.serialization.safe_globals(list(safe)):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive(path))
    except Exception as error:  # a file that was made by hand may fail anywhere in torch's reader
        if isinstance(error, pickle.UnpicklingError) and path.suffix != ".safetensors":
            why = "holds more than weights" if forbidden(error) else "is damaged, or holds more than weights"
            raise CheckpointError(f"{what} {why} ({refusal(error)}); give another one.") from error
        kind = "as a checkpoint" if path.suffix != ".safetensors" else "as .safetensors"
        raise CheckpointError(
            f"{what} cannot be read {kind} ({refusal(error)}); it is damaged, give another one."
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{what} holds {type(content).__name__}, a checkpoint was expected; give another one.")
    with in_file(path, option):
        sound(content)
    return dict(content)


@contextmanager
def in_file(path: str | Path, option: str = "") -> Iterator[None]:
    """Inside, an entry that is not as it must be is an error that names the file.

    Raises:
        CheckpointError: In place of ``Mismatch``.
    """
    try:
        yield
    except Mismatch as error:
        raise CheckpointError(f"{named(path, option)}: {one_line(error)}; give another checkpoint.") from error


def check(content: Any, kind: Kind, path: str | Path, option: str = "") -> None:
    """Refuse what was read from a file where it is not of a kind.

    Raises:
        CheckpointError: Naming file and entry.
    """
    with in_file(path, option):
        kind.check(content)


def options_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a checkpoint was trained with; timm keeps its own in a namespace.

    Example:
        >>> options_in({"args": Namespace(model="resnet18")}), options_in({})
        ({'model': 'resnet18'}, {})
    """
    args = checkpoint.get("args") or {}
    return dict(args if isinstance(args, Mapping) else vars(args))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a loop of links, a null character
        return False


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    return {"state_dict": state, "args": json.loads(metadata.get("args", "{}"))}
