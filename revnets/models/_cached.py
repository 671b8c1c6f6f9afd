"""Published weights in the caches of torch and of Hugging Face, compared with the SHA-256 that their names tell."""

import logging
import re
from pathlib import Path
from typing import Any

import timm
import torch

from ..training.checkpoints.integrity import sha256_of

_logger = logging.getLogger(__name__)
_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z]")  # torch's convention: resnet18-5c106cde.pth
_SHA256 = re.compile(r"[0-9a-f]{64}")


def drop_wrong_cache(model: str) -> list[Path]:
    """Remove published weights of a model from the caches where they are not what their names say.

    timm uses whatever is in a cache; what was removed, it downloads again.

    Args:
        model: timm's name, with or without a tag.

    Returns:
        The files that were removed.
    """
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    found = [] if cfg is None else [*_of_torch(cfg.url), *_of_hugging_face(cfg.hf_hub_id, cfg.hf_hub_filename)]
    wrong = [path for path, digest in found if not sha256_of(path).startswith(digest)]
    for path in wrong:
        _logger.warning(f"cached weights '{path}' of {model} have another SHA-256 than published: removed")
        path.unlink(missing_ok=True)
    return wrong


def _of_torch(url: Any) -> list[tuple[Path, str]]:
    name = url.rsplit("/", 1)[-1] if isinstance(url, str) else ""
    digest, path = _IN_NAME.search(name), Path(torch.hub.get_dir()) / "checkpoints" / name
    return [(path, digest[1])] if digest and path.is_file() else []


def _of_hugging_face(repository: Any, filename: Any) -> list[tuple[Path, str]]:
    """Large files lie there under their SHA-256, and links with their names lead to them."""
    if not isinstance(repository, str):
        return []
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return []
    name, _, revision = repository.partition("@")
    found = []
    for each in (filename or "pytorch_model.bin", "model.safetensors"):
        link = try_to_load_from_cache(name, each, revision=revision or None)
        path = Path(link).resolve() if isinstance(link, str) else Path()
        if _SHA256.fullmatch(path.name) and path.is_file():
            found.append((path, path.name))
    return found
