"""Sparse checkpoints: weights without their zeros, in a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...sparsity.found import is_sparse
from ...training.checkpoints.weights import unfit
from ...training.files import write, writing

FORMAT = "revnets-sparse-1"
_VALUES, _PLACES = ".values", ".places"


def save_sparse(model: nn.Module, path: str | Path) -> Path:
    """Write a model's state with every masked weight as its active values and a bit per place.

    A weight of n numbers of which k are active takes ``4 k + n / 8`` bytes in float32; the mask comes back exactly,
    active zeros included. The file is there complete or not at all.

    Args:
        model: with sparse layers; all else is stored as it is.
        path: of the file, by custom ``.safetensors``.

    Raises:
        ValueError: when the folder does not exist.

    Example:
        >>> import tempfile; from revnets.layers import SparseLinear
        >>> net, other = SparseLinear(64, 64, sparsity=0.9), SparseLinear(64, 64, sparsity=0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_sparse(other, save_sparse(net, folder + "/net.safetensors"))
        >>> torch.equal(net.weight, other.weight) and torch.equal(net.mask, other.mask)
        True
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{str(path)!r}: the folder does not exist: create it first")
    masked = masked_names(model)
    tensors: dict[str, Tensor] = {}
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        if owner in masked and leaf == "weight":
            mask = state[f"{owner}.mask" if owner else "mask"]
            tensors[name + _VALUES] = tensor[mask]
            tensors[name + _PLACES] = pack_bits(mask)
        elif not (owner in masked and leaf == "mask"):
            tensors[name] = tensor.contiguous().clone()  # shared tensors are stored twice
    with writing(path, (SafetensorError,)):
        return write(path, lambda temporary: save_file(tensors, temporary, metadata={"format": FORMAT}))


def load_sparse(model: nn.Module, path: str | Path) -> None:
    """Load what ``save_sparse`` wrote, masks included, into a model with the same layers.

    Args:
        model: changed in place, only if everything fits.
        path: of the file.

    Raises:
        ValueError: for a file that is missing or none of ours, or layers, masks or shapes that do not match; names the
            first one.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}: give one that save_sparse wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            stored = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is no valid safetensors file ({error}): give one that save_sparse wrote"
        ) from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is of format {metadata.get('format')!r}, expected {FORMAT!r} (save_sparse)")
    state = _expanded(model, stored, str(path))
    if problem := unfit(model.state_dict(), state):
        raise ValueError(f"{path}: {problem}: give a file of this model's weights")
    model.load_state_dict(state)


def _expanded(model: nn.Module, stored: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The model's state dict from the stored tensors."""
    masked, own = masked_names(model), model.state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in own.items():
        owner, _, leaf = name.rpartition(".")
        if owner in masked and leaf in ("weight", "mask"):
            weight = name.removesuffix(leaf) + "weight"
            if weight + _VALUES not in stored or weight + _PLACES not in stored:
                raise ValueError(f"{path}: {owner or 'the model'} is sparse in the model but not in the file")
            mask = unpack_bits(stored[weight + _PLACES], tensor.shape)
            values = stored[weight + _VALUES]
            if mask is None or int(mask.sum()) != values.numel() or values.dim() != 1:
                raise ValueError(
                    f"{path}: the mask of {owner or 'the model'} does not match the model's weight of shape "
                    f"{tuple(tensor.shape)}: convert the model with the same spec first"
                )
            state[name] = (
                mask if leaf == "mask" else torch.zeros(tensor.shape, dtype=values.dtype).masked_scatter_(mask, values)
            )
        elif name in stored and stored[name].shape == tensor.shape:
            state[name] = stored[name]
        elif name + _VALUES in stored:
            raise ValueError(f"{path}: {name!r} is sparse in the file but not in the model: convert the model first")
        else:
            shape = tuple(stored[name].shape) if name in stored else "missing"
            raise ValueError(f"{path}: {name} is {shape}, the model's has shape {tuple(tensor.shape)}")
    known = {*own, *(name + end for name in own for end in (_VALUES, _PLACES))}
    for name in stored:
        if name not in known:
            raise ValueError(f"{path}: the model has no {name.removesuffix(_VALUES).removesuffix(_PLACES)!r}")
    return state


def masked_names(model: nn.Module) -> set[str]:
    """Names of the modules that have a ``weight`` and a bool buffer ``mask`` of its shape."""
    return {name for name, module in model.named_modules() if is_sparse(module)}


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as bytes, eight places in each, the first in the lowest bit.

    Example:
        >>> pack_bits(torch.tensor([True, False, False, True, False, False, False, False, True]))
        tensor([9, 1], dtype=torch.uint8)
    """
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor | None:
    """The bool tensor that was packed; None where these are no bytes, or of another number than fits the shape."""
    numel = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != -(-numel // 8):
        return None
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:numel].view(shape).bool()
