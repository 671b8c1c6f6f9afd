"""Checkpoints of networks, read as plain tensors and values, and pruned weights, written whole or not at all."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FLOPS = "flops_of_all_phases"
"""Under this name a checkpoint holds the FLOPs of the trainings that its weights come from."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ``classification/train.py`` or timm, a bare state dict (then under ``state_dict``), safetensors.

    Raises:
        ValueError: for a file that is missing, damaged, or holds more than weights and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}: give an existing checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return {"state_dict": state, "args": json.loads(metadata.get("args", "{}"))}
        with torch.serialization.safe_globals([Namespace]):  # timm's own checkpoints hold their options in one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:160]
        raise ValueError(f"{str(path)!r} cannot be read as a checkpoint ({reason}): give another one") from error
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise ValueError(f"{str(path)!r} is no valid .safetensors file ({error}): give another one") from error
        raise
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, expected a checkpoint: give another one")
    return dict(content) if "state_dict" in content else {"state_dict": content.get("model", content)}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, the averaged ones where it has some, without prefixes of wrappers.

    Raises:
        ValueError: see ``read_checkpoint``.
    """
    return best_weights(read_checkpoint(path))


def best_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averaged weights (EMA) of a checkpoint or, where there are none, the weights."""
    from timm.models import clean_state_dict

    weights: dict[str, Tensor] = clean_state_dict(checkpoint.get("state_dict_ema") or checkpoint["state_dict"])
    return weights


def flops_of(checkpoint: Mapping[str, Any]) -> float:
    """FLOPs of the trainings that the weights of a checkpoint come from, as far as it knows.

    Example:
        >>> flops_of({"state_dict": {}, "flops_of_all_phases": 1e15}), flops_of({"state_dict": {}})
        (1000000000000000.0, 0.0)
    """
    return float(checkpoint.get(FLOPS, 0.0))


def save_weights(model: nn.Module, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a model's state as safetensors, which ``timm.create_model(..., checkpoint_path=)`` reads.

    Args:
        model: whose layers are torch's own.
        path: ends in ``.safetensors``.
        metadata: further words for the file's header.

    Raises:
        NotWritten: there is no space, say.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from ..profiling.report import write
    from ..training.files import writing

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with writing(path, (SafetensorError,)):
        return write(path, lambda temporary: save_file(tensors, temporary, {"format": "pt", **metadata}))
