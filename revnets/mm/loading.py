"""MMEngine's loaders of checkpoints, made to read data only: for the whole process, once ``revnets.mm`` is imported.

MMEngine reads safely at first, but with ``getattr`` among the functions that a file may call, which is enough to run
anything, and reads whatever is refused again unsafely. Here both are gone.
"""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.fileio.handlers.yaml_handler import YamlHandler
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as loaders

from ..training.checkpoints.integrity import damage, is_archive, refusal, sha256_of
from ..training.errors import UserError

TRUST = "REVNETS_TRUST_CHECKPOINTS"
"""Environment variable: ``1`` reads checkpoints as they are, code in them included."""

_METHODS = ("min", "max", "current", "mean")
_HASH = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z]")  # of the file, in its name: a convention of OpenMMLab and of torch


class RefusedCheckpoint(UserError, ValueError):
    """A checkpoint that is damaged, or holds more than data."""


def safe_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What a checkpoint of MMEngine may name besides tensors: histories of numbers, and what NumPy needs for arrays."""
    core = getattr(np, "_core", None) or np.core
    arrays = {"_reconstruct": core.multiarray._reconstruct, "scalar": core.multiarray.scalar}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # of NumPy 1 and 2, either reads the other's
    return [
        slice,
        np.ndarray,
        np.dtype,
        HistoryBuffer,
        (_method_of_history, "builtins.getattr"),
        *dict.fromkeys(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
        *((function, f"{module}.{name}") for module in modules for name, function in arrays.items()),
    ]


def _method_of_history(owner: Any, name: str) -> Any:
    """In place of ``getattr``: for what a ``HistoryBuffer`` is written with, its methods' names, and for nothing else.

    Raises:
        UnpicklingError: for anything else.
    """
    if owner is HistoryBuffer and name in _METHODS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f"it looks up {str(name)[:60]!r}, which weights have no need for")


def _load(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """In place of MMEngine's ``_safe_torch_load``, which all of its loaders call.

    Raises:
        RefusedCheckpoint: for a damaged file, or one that holds more than data.
    """
    if os.environ.get(TRUST) == "1":
        return torch.load(file, map_location=map_location, weights_only=False)
    what = f"checkpoint '{file}'" if isinstance(file, (str, Path)) else "the checkpoint"
    if isinstance(file, (str, Path)) and is_archive(file) and (problem := damage(file)):
        raise RefusedCheckpoint(f"{what} is damaged: {problem}; give another file")
    try:
        with torch.serialization.safe_globals(safe_globals()):
            content = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedCheckpoint(
            f"{what} holds more than weights ({refusal(error)}); give another file, or set {TRUST}=1 if you trust its "
            "maker"
        ) from error
    meta = content.get("meta") if isinstance(content, dict) else None
    if isinstance(meta, dict):
        meta.pop("config", None)  # a resumed runner would execute it, for the number of GPUs of an older release
    return content


def _load_local(filename: str, map_location: Any = None) -> Any:
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f"{filename} can not be found.")
    return _load(filename, map_location)


def _load_url(
    url: str,
    model_dir: str | None = None,
    map_location: Any = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: str | None = None,
) -> Any:
    """In place of ``load_state_dict_from_url``: compares the hash in a file's name each time, and reads data only.

    Raises:
        RefusedCheckpoint: for a file of another hash, or one that holds more than data.
    """
    folder = Path(model_dir or Path(torch.hub.get_dir()) / "checkpoints")
    path = folder / (file_name or os.path.basename(url.split("?")[0].split("#")[0]))
    known = _HASH.search(path.name)
    if path.exists() and known and not sha256_of(path).startswith(known[1]):
        path.unlink()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), known[1] if known else None, progress)
        except RuntimeError as error:  # of another hash
            raise RefusedCheckpoint(f"{url} is not what its name says: {error}; download it by hand") from error
    return _load(str(path), map_location)


def install() -> None:
    """Have all of MMEngine's loaders read data only: files, addresses, model zoos; and its YAML files, too."""
    loaders._safe_torch_load = _load
    loaders.load_url = _load_url
    _load_local.__name__ = "load_from_local"  # MMEngine logs a part of it
    loaders.CheckpointLoader.register_scheme("", _load_local, force=True)
    loaders.load_from_local = _load_local
    if not getattr(YamlHandler.load_from_fileobj, "is_safe", False):
        YamlHandler.load_from_fileobj = _load_yaml


def _load_yaml(self: YamlHandler, file: Any, **options: Any) -> Any:
    import yaml

    return yaml.load(file, **{"Loader": yaml.SafeLoader, **options})


_load_yaml.is_safe = True  # type: ignore[attr-defined]
