"""What a configuration must hold where this package reads it: one table of key paths and kinds, checked before use.

MMEngine itself takes anything and fails on it later, in words of its own; see `detection.runner` for that door.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from revnets.training.errors import UserError, shown
from revnets.training.options.parsing import SEED

NEEDED = ("model", "train_dataloader", "train_cfg", "optim_wrapper", "test_dataloader", "test_evaluator")
Kind = tuple[str, Callable[[Any], bool]]


def _whole(low: int, high: int) -> Kind:
    return (
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def _or_many(kind: Kind) -> Kind:
    words, fits = kind
    return (
        f"{words}, or a list of such",
        lambda value: all(map(fits, value)) if isinstance(value, (list, tuple)) else fits(value),
    )


MAPPING: Kind = ("a dict(...)", lambda value: isinstance(value, Mapping))
LIST: Kind = ("a list", lambda value: isinstance(value, (list, tuple)))
MAPPINGS: Kind = ("a list of dict(...)", lambda value: LIST[1](value) and all(map(MAPPING[1], value)))
TEXT: Kind = ("text", lambda value: isinstance(value, str) and "\0" not in value)
FLAG: Kind = ("True or False", lambda value: isinstance(value, bool))
NUMBER: Kind = (
    "a number",
    lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
)
TYPE: Kind = ("the name of a class, or one", lambda value: isinstance(value, (str, type)))
COUNT = _whole(1, 1 << 31)
DATASET: dict[str, Kind] = {
    "type": TYPE,
    "ann_file": TEXT,
    "data_root": TEXT,
    "data_prefix": MAPPING,
    "data_prefix.img": TEXT,
    "metainfo": MAPPING,
    "metainfo.classes": _or_many(TEXT),
    "filter_cfg": MAPPING,
    "filter_cfg.min_size": NUMBER,
    "filter_cfg.filter_empty_gt": FLAG,
    "pipeline": MAPPINGS,
    "test_mode": FLAG,
}
EVALUATOR: dict[str, Kind] = {"type": TYPE, "ann_file": TEXT, "metric": _or_many(TEXT)}
KEYS: dict[str, Kind] = {
    "model": MAPPING,
    "model.type": TYPE,
    "model.backbone": MAPPING,
    "model.backbone.init_cfg": MAPPING,
    "train_cfg": MAPPING,
    "train_cfg.type": TYPE,
    "train_cfg.by_epoch": FLAG,
    "train_cfg.max_epochs": COUNT,
    "train_cfg.max_iters": COUNT,
    "train_cfg.val_interval": COUNT,
    "optim_wrapper": MAPPING,
    "optim_wrapper.optimizer": MAPPING,
    "default_hooks": MAPPING,
    "default_hooks.checkpoint": MAPPING,
    "default_hooks.checkpoint.save_best": _or_many(TEXT),
    "default_hooks.logger": MAPPING,
    "default_hooks.logger.interval": COUNT,
    "custom_hooks": LIST,
    "randomness": MAPPING,
    "randomness.seed": _whole(0, SEED),
    "visualizer": MAPPING,
    "visualizer.vis_backends": MAPPINGS,
    "auto_scale_lr": MAPPING,
    "auto_scale_lr.base_batch_size": COUNT,
    "env_cfg": MAPPING,
    "env_cfg.mp_cfg": MAPPING,
    "env_cfg.dist_cfg": MAPPING,
    "find_unused_parameters": FLAG,
    "sync_bn": TEXT,
    "work_dir": TEXT,
    "load_from": TEXT,
    "resume": FLAG,
    "data_root": TEXT,
}
for _name in ("train", "val", "test"):
    KEYS |= {
        f"{_name}_dataloader": MAPPING,
        f"{_name}_dataloader.batch_size": COUNT,
        f"{_name}_dataloader.num_workers": _whole(0, 1024),
        f"{_name}_dataloader.dataset": MAPPING,
    }
    if _name != "train":
        KEYS[f"{_name}_evaluator"] = _or_many(MAPPING)


def check_keys(cfg: Any, path: str) -> None:
    """Compares a configuration with the table.

    Args:
        cfg: MMEngine's `Config`.
        path: Of its file, for messages.

    Raises:
        UserError: A part that every detector has is missing, or a value is of another kind; the key is named.
    """
    content = cfg._cfg_dict
    for key in NEEDED:
        if content.get(key) is None or content[key] == {}:
            raise UserError(f"CONFIG: '{path}' sets no {key}; it is part of every detector's configuration.")
    _check(content, KEYS, path, "")
    for name in ("train", "val", "test"):
        loader = content.get(f"{name}_dataloader")
        if loader is None:
            continue
        for dataset, where in _datasets(loader.get("dataset"), f"{name}_dataloader.dataset", path):
            _check(dataset, DATASET, path, f"{where}.")
            if dataset.get("type") is None:
                raise UserError(f"CONFIG: '{path}': {where} has no type; name the class of the data set.")
    for name in ("val", "test"):
        evaluators = content.get(f"{name}_evaluator") or []
        for evaluator in [evaluators] if isinstance(evaluators, Mapping) else evaluators:
            _check(evaluator, EVALUATOR, path, f"{name}_evaluator.")


def _check(content: Mapping[str, Any], kinds: Mapping[str, Kind], path: str, before: str) -> None:
    for key, (words, fits) in kinds.items():
        value: Any = content
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and not fits(value):
            raise UserError(
                f"CONFIG: '{path}': {before}{key}: {shown(value)} was given where {words} was expected; correct it."
            )


def _datasets(value: Any, where: str, path: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """A data set, and those inside of wrappers."""
    if not isinstance(value, Mapping):
        raise UserError(
            f"CONFIG: '{path}': {where}: {shown(value)} was given where dict(...) was expected; correct it."
        )
    yield value, where
    inner = value.get("datasets")
    if inner is not None and not LIST[1](inner):
        raise UserError(f"CONFIG: '{path}': {where}.datasets: {shown(inner)} was given where a list was expected.")
    for number, each in enumerate(inner or []):
        yield from _datasets(each, f"{where}.datasets[{number}]", path)
    if value.get("dataset") is not None:
        yield from _datasets(value["dataset"], f"{where}.dataset", path)
