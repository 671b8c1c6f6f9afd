"""The weights of checkpoints, and pruned weights, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..training.checkpoints.held import FLOPS
from ..training.checkpoints.reading import read_checkpoint
from ..training.files import write, writing


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, the averaged ones where it has some, without prefixes of wrappers.

    Raises:
        ValueError: see ``read_checkpoint``.
    """
    return best_weights(read_checkpoint(path))


def best_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averaged weights (EMA) of a checkpoint or, where there are none, the weights."""
    from timm.models import clean_state_dict

    averaged = checkpoint.get("state_dict_ema") or checkpoint.get("model_ema")
    weights: dict[str, Tensor] = clean_state_dict(averaged or checkpoint["state_dict"])
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

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    with writing(path, (SafetensorError,)):
        return write(path, lambda temporary: save_file(tensors, temporary, {"format": "pt", **metadata}))
