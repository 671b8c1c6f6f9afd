"""Weights for a backbone: from a file, from a classification run, from a detector's checkpoint, or by timm's name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from ...models._cached import drop_wrong_cache
from ...models._revbifpn_checkpoint import check_file
from ...models.revbifpn import RevBiFPN, checkpoint_filter_fn
from ...pruning import densify
from ...pruning.checkpoint import best_weights, flops_of
from ...sparsity import sparse_layers
from ...training.checkpoints.reading import read_checkpoint
from ...training.checkpoints.weights import unfit
from ...training.errors import reason

SCHEME = "timm://"


def load_pretrained(net: nn.Module, model_name: str, checkpoint: str, prefix: str | None = None) -> float:
    """Load the weights of a backbone; every tensor of it must be there, with its shape.

    Masks of a sparse pre-training are dropped where the backbone is dense: it is then fine-tuned dense.

    Args:
        net: a feature network of timm (``features_only=True``), as ``TimmBackbone`` holds it.
        model_name: its name.
        checkpoint: path of a file: a checkpoint of ``classification/train.py`` or of timm (averaged weights are
            preferred where it has some), a bare state dict, published RevBiFPN weights, safetensors, or with
            ``prefix`` a detector's. Or ``timm://NAME``: the weights that timm knows under this name.
        prefix: of the backbone's keys in a detector's checkpoint, e.g. ``"backbone."``.

    Returns:
        FLOPs of the trainings that the weights come from, as far as the checkpoint knows.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, holds more than weights, or is of another network.
    """
    flops = 0.0
    if checkpoint.startswith(SCHEME):
        state = _from_timm(checkpoint.removeprefix(SCHEME))
    else:
        check_file(Path(checkpoint))
        content = read_checkpoint(checkpoint)
        state, flops = best_weights(content), flops_of(content)
    if prefix:
        cut = prefix.rstrip(".") + "."
        state = {key.removeprefix(cut): value for key, value in state.items() if key.startswith(cut)}
        if not state:
            raise ValueError(f"checkpoint {checkpoint} has no key that starts with {cut!r}: check init_cfg's prefix")
    state = {key.removeprefix("net."): value for key, value in state.items()}  # this project's backbones
    if not sparse_layers(net):
        state = densify(state)  # of a sparse pre-training
    whole = inner(net)
    if isinstance(whole, RevBiFPN):
        whole.load_state_dict(_known(checkpoint_filter_fn(_unwrapped(state), whole), whole))
        return flops
    # wrappers of timm hold the network as `model`, or turn the dots of a module's name into underscores
    found = {key.removeprefix("model.").replace(".", "_"): value for key, value in state.items()}
    own = {key: found.get(key.removeprefix("model.").replace(".", "_")) for key in net.state_dict()}
    _check(own, net, model_name, checkpoint)
    net.load_state_dict(own)
    return flops


def inner(net: nn.Module) -> Any:
    """The network of timm inside of what ``features_only`` wraps around some."""
    wrapped = getattr(net, "model", None)
    return wrapped if isinstance(wrapped, nn.Module) else net


def _from_timm(name: str) -> dict[str, Tensor]:
    if not timm.is_model(name):
        raise ValueError(f"{SCHEME}{name}: timm knows no model {name!r}")
    drop_wrong_cache(name)
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (RuntimeError, OSError) as error:  # it has no weights, or they cannot be fetched
        raise ValueError(f"{SCHEME}{name}: {reason(error)}") from error


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("model."): value for key, value in state.items()}


def _known(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Without classifier and head, which a backbone has not."""
    return {key: state[key] for key in model.state_dict() if key in state}


def _check(state: Mapping[str, Any], net: nn.Module, name: str, checkpoint: str) -> None:
    own = net.state_dict()
    missing = [key for key, value in state.items() if value is None]
    wrong = [key for key, value in state.items() if value is not None and value.shape != own[key].shape]
    if missing or wrong:
        key = (missing or wrong)[0]
        reason = f"{key} is missing" if missing else f"{key} has shape {tuple(state[key].shape)}"
        raise ValueError(
            f"checkpoint {checkpoint} is not of {name}: {len(missing) + len(wrong)} of {len(own)} tensors do not fit, "
            f"for example {reason}, expected {tuple(own[key].shape)}"
        )
    if problem := unfit(own, state):
        raise ValueError(f"checkpoint {checkpoint} cannot be loaded: {problem}")
