"""Published RevBiFPN weights: where they are, how they are verified, and how their keys map to ours."""

import logging
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg
from torch import Tensor, nn

from ..training.checkpoints.integrity import sha256_of
from ..training.checkpoints.weights import unfit

_logger = logging.getLogger(__name__)
_URL = "https://cerebras-public.s3.us-west-2.amazonaws.com/revbifpn/revbifpn_s{n}.pth.tar"
_SHA256 = (
    "a9ee012a2670003ea18deca1afaed7c1323ffaafc83b0a30874d262bf2403cfa",
    "584b0c3ea677ac5eff6c0f54b4b683973e7533bfde334155cd770aef041673c4",
    "62ff9387b498550d31e248742a002be22cb29e800cd387ec9c93b6da7418dcc8",
    "1695576b09ee9fc584df616abaf0762188122468825cc92b5abfeec63b609d25",
    "61d7b65524000bb147aac26ad559906a2380e55a499d9d420063cc2b9e2ef42a",
    "d7713a25c7f62bf4b9ebaa2693a7b6896e7965c6647cbd1d98eddeae8b74cdc3",
    "31f355d5fb54610ad9051d08d0ec10bb0d33f40c0936352cb863b9f9a3d4fa09",
)
_IMAGE_SIZE = (224, 256, 256, 288, 320, 352, 352)


@dataclass
class HashedCfg(PretrainedCfg):
    """timm's description of pretrained weights, with the SHA-256 that the file must have."""

    sha256: str | None = None


def weights_cfg(n: int | None) -> HashedCfg:
    """Description of the published weights of S``n``, or of no weights (None: the test variant)."""
    size = 64 if n is None else _IMAGE_SIZE[n]
    reduction = 16 if n is None else 32
    return HashedCfg(
        url=None if n is None else _URL.format(n=n),
        sha256=None if n is None else _SHA256[n],
        input_size=(3, size, size),
        min_input_size=(3, reduction, reduction),
        pool_size=(size // reduction, size // reduction),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=(),  # the stem has no weights
        classifier="classifier",
        license="apache-2.0",
        paper_name="RevBiFPN: The Fully Reversible Bidirectional Feature Pyramid Network",
        paper_ids="arXiv:2206.14098",
        origin_url="https://github.com/CerebrasResearch/RevBiFPN",
    )


def pretrained_overlay(
    default: PretrainedCfg, cfg: Any, overlay: Mapping[str, Any] | None, folder: str | Path | None = None
) -> dict[str, Any]:
    """Overlay for timm that points at a verified local copy of the default weights.

    A source that the user gave (file, state dict, hub id or URL in ``cfg`` or ``overlay``) is left alone.

    Args:
        default: the variant's own description.
        cfg: the user's ``pretrained_cfg``, a tag, a dict or an object, or None.
        overlay: the user's ``pretrained_cfg_overlay``.
        folder: where to keep downloaded files; torch's hub folder by default.

    Returns:
        the overlay to use.

    Raises:
        RuntimeError: when the file cannot be fetched or has another hash.
        FileNotFoundError: when the user's file is missing.
        ValueError: when it is truncated.
    """
    given = dict(overlay or {})
    described = cfg if isinstance(cfg, Mapping) else vars(cfg) if isinstance(cfg, PretrainedCfg) else {}
    file = given.get("file") or described.get("file")
    if file and described.get("source") != "local-dir":
        check_file(Path(file))
    sources = ("file", "state_dict", "hf_hub_id", "url")
    url = default.url
    if any(given.get(key) for key in sources) or any(described.get(key) not in (None, url) for key in sources):
        return given
    sha256 = getattr(default, "sha256", None)
    if isinstance(url, str) and sha256:
        given["file"] = str(fetch(url, sha256, folder))
    return given


def check_file(path: Path) -> None:
    """One sentence for what torch reports as a failure inside its archive reader, or without a message."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is not there: pass the path of a checkpoint file")
    with path.open("rb") as file:
        start = file.read(4)
    if not start or (start == b"PK\x03\x04" and not zipfile.is_zipfile(path)):
        raise ValueError(
            f"checkpoint {path} is truncated, its end is missing after {path.stat().st_size} bytes: "
            "copy or download it again"
        )


def fetch(url: str, sha256: str, folder: str | Path | None = None) -> Path:
    """Download a file once into torch's hub folder, and verify it each time.

    Args:
        url: its address.
        sha256: its digest, in full.
        folder: where to keep it; torch's hub folder by default.

    Raises:
        RuntimeError: when the download fails or the digest differs; nothing new is left behind.
    """
    folder = Path(folder or Path(torch.hub.get_dir()) / "checkpoints")
    path = folder / f"{sha256[:8]}-{url.rsplit('/', 1)[-1]}"
    had = ""
    if path.is_file():
        if sha256_of(path) == sha256:
            return path
        had = f" ('{path}' is there, but has another SHA-256)"
        _logger.warning(f"cached weights '{path}' have another SHA-256 than published: they are downloaded again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # downloads to a temporary file, compares the digest, then renames
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except Exception as error:
        raise RuntimeError(
            f"pretrained weights could not be fetched from {url} (sha256 {sha256}): {error}{had}; download the file by "
            "hand and pass pretrained_cfg_overlay=dict(file=PATH), or use pretrained=False"
        ) from error
    return path


# --- keys ------------------------------------------------------------------------------------------------------------

_MBCONV = {
    "exp_conv.conv": "conv_pw",
    "exp_conv.norm": "bn1",
    "dw_conv.conv": "conv_dw",
    "dw_conv.norm": "bn2",
    "se.se.1": "se.fc1",
    "se.se.3": "se.fc2",
    "project_conv.conv": "conv_pwl",
    "project_conv.norm": "bn3",
}
_HEAD = {"head.final_conv.conv": "head.conv", "head.final_conv.norm": "head.bn", "head.fc": "classifier"}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a published RevBiFPN checkpoint to this library's; values are passed on untouched.

    Args:
        state_dict: of the published network, or a checkpoint dict that holds it under ``state_dict`` or ``model``;
            one with this library's keys is returned as it is.
        model: the network to be loaded.

    Returns:
        keys of ``model.state_dict()`` to tensors.

    Raises:
        ValueError: when the checkpoint belongs to another variant or network.
    """
    for key in ("state_dict", "model"):
        inner = state_dict.get(key)
        if isinstance(inner, Mapping):
            state_dict = inner
    odd = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if odd:
        kind = type(state_dict[odd[0]]).__name__
        raise ValueError(f"the checkpoint holds {kind} under {odd[0]!r}, expected a tensor: pass a dict of weights")
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if any(key.startswith(("rev_stack.", "head.pyramid_heads.")) for key in state):
        outputs = _silo_outputs(state)
        state = {_rename(key, outputs): value for key, value in state.items()}
    _check_fits(state, model)
    described = all(value.is_meta for value in state.values())  # names and shapes alone, nothing to be loaded
    if not described and (problem := unfit(model.state_dict(), state)):
        raise ValueError(f"the checkpoint cannot be loaded: {problem}; pass a file of plain weights")
    return state


def _silo_outputs(state: Mapping[str, Any]) -> dict[int, int]:
    """For each op of the body that is a silo: its number of outputs, which the published up keys count back from."""
    outputs: dict[int, int] = {}
    for key in state:
        if match := re.match(r"rev_stack\.(\d+)\.f\.xform_(\d+)_(\d+)\.", key):
            op, target = int(match[1]), int(match[3])
            outputs[op] = max(outputs.get(op, 0), target + 1)
    return outputs


def _rename(key: str, outputs: Mapping[int, int]) -> str:
    for old, new in _HEAD.items():
        if key.startswith(old + "."):
            return new + key[len(old) :]
    if match := re.match(r"head\.pyramid_heads\.(\d+)\.(.+)", key):
        return f"head.blocks.{match[1]}.{_rename_mbconv(match[2])}"
    if match := re.match(r"rev_stack\.recomp_op\.recomp_transform_(\d+)\.(.+)", key):
        return f"neck.blocks.{match[1]}.{_rename_mbconv(match[2])}"
    if match := re.match(r"rev_stack\.(\d+)\.rev_transform_(\d+)\.([fg])\.xform_0_1\.(.+)", key):
        return f"body.ops.{match[1]}.ops.{match[2]}.{match[3]}.{_rename_mbconv(match[4])}"
    if match := re.match(r"rev_stack\.(\d+)\.f\.xform_(\d+)_(\d+)\.(.+)", key):
        return f"body.ops.{match[1]}.down.{match[2]}_{match[3]}.{_rename_mbconv(match[4])}"
    if match := re.match(r"rev_stack\.(\d+)\.g\.xform_(\d+)_(\d+)\.0\.(.+)", key):
        last = outputs[int(match[1])] - 1
        return f"body.ops.{match[1]}.up.{last - int(match[2])}_{last - int(match[3])}.0.{_rename_mbconv(match[4])}"
    return key


def _rename_mbconv(key: str) -> str:
    for old, new in _MBCONV.items():
        if key.startswith(old + "."):
            return new + key[len(old) :]
    return key


def _check_fits(state: Mapping[str, Any], model: nn.Module) -> None:
    """One sentence instead of hundreds of lines when a checkpoint is of another variant, or lacks a part.

    timm loads loosely where the number of classes differs, so this has to find every gap. The stem (present with many
    input channels) and the classifier are the caller's; a pruned model may leave tensors of the checkpoint over.
    """
    own = {key: tuple(v.shape) for key, v in model.state_dict().items() if not key.startswith(("stem.", "classifier."))}
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    missing = [key for key in own if key not in theirs]
    ops = {_op(key) for key in own}
    extra = [key for key in theirs if key.startswith("body.") and _op(key) not in ops]
    wrong = [key for key in own if key in theirs and own[key] != theirs[key]]
    if missing or extra:
        example = f"for example {(missing or extra)[0]} is {'missing' if missing else 'left over'}"
        detail = f"{len(missing)} of its tensors are missing and {len(extra)} are left over, {example}"
    elif wrong:
        detail = f"{wrong[0]} has shape {theirs[wrong[0]]}, expected {own[wrong[0]]}"
    else:
        return
    raise ValueError(
        f"the checkpoint is not of this {type(model).__name__} variant: {detail}; "
        "create the variant that the file was saved from"
    )


def _op(key: str) -> str:
    """The op of the body that a key belongs to: ``body.ops.3`` of ``body.ops.3.down.0_1.bn2.weight``."""
    return ".".join(key.split(".")[:3])
