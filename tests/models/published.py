"""The published networks as data: key lists, the weights that the golden data were made with, and the golden data."""

import gzip
import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from revnets.models.revbifpn import checkpoint_filter_fn

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = tuple(f"revbifpn_s{n}" for n in range(7))
SEEDS_AND_SIZES = {"revbifpn_s0": (1, 224), "revbifpn_s1": (2, 128), "revbifpn_s3": (3, 96)}
Golden = dict[str, NDArray[np.float64]]


@cache
def _published() -> dict[str, dict[str, list[int]]]:
    with gzip.open(GOLDEN / "official_state_dict_keys.json.gz") as file:
        return json.load(file)


def published_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the published checkpoint, in its order."""
    return {key: tuple(shape) for key, shape in _published()[variant].items()}


@cache
def published_weights(variant: str, seed: int = 0) -> dict[str, Tensor]:
    """Values in the published layout, by the recipe of `tests/golden/README.md`; do not write to them."""
    return {key: _weight(key, shape, seed) for key, shape in published_shapes(variant).items()}


def _weight(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    if key.endswith("running_var") or key.endswith("norm.weight"):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) in (2, 4):
        value = rng.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
    else:  # running means and biases
        value = 0.1 * rng.standard_normal(shape)
    return torch.from_numpy(value.astype(np.float32))


def published_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Key of `model` to key in the published layout: the conversion hands the very same tensors on."""
    names = {id(value): key for key, value in weights.items()}
    return {key: names[id(value)] for key, value in checkpoint_filter_fn(weights, model).items()}


@cache
def golden(variant: str) -> Golden:
    """What the published network gives."""
    seed, size = SEEDS_AND_SIZES[variant]
    with np.load(GOLDEN / f"{variant}_seed{seed}_{size}px.npz") as arrays:
        return dict(arrays)


def golden_weights(variant: str) -> dict[str, Tensor]:
    return published_weights(variant, SEEDS_AND_SIZES[variant][0])


def golden_input(variant: str) -> Tensor:
    seed, size = SEEDS_AND_SIZES[variant]
    number = golden(variant)["eval_logits"].shape[0]
    values = np.random.default_rng([seed, 7]).standard_normal((number, 3, size, size))
    return torch.from_numpy(values.astype(np.float32))
