"""Looks at annotations, images and checkpoints before a run: what would fail or mislead later is said now."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from revnets.training.checkpoints.weights import unfit
from revnets.training.errors import UserError, did_you_mean

from .annotations import Split, check_categories, read, some, splits
from .checkpoints import Checkpoint
from .objects import check_objects
from .sizes import check_sizes

_logger = logging.getLogger("detection")
COCO_PARTS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "mAP_copypaste")
METRICS = ("CocoMetric", "CheckedCocoMetric")


def check_data(cfg: Any, names: Sequence[str]) -> None:
    """Goes over all annotations and image files of data sets in COCO's format.

    What MMDetection skips is counted, named and warned of: annotations of no or an unwanted category, boxes without
    area, images too small to train on or without an object. All else stops.

    Args:
        cfg: The configuration.
        names: Of its data sets: train, val, test.

    Raises:
        UserError: A file that is missing, truncated or no annotations; categories that are not those of the
            configuration; sizes that are not the files'; nothing to train or to measure on.
    """
    seen: set[tuple[Path, bool]] = set()
    files: dict[str, set[str]] = {}
    for name in names:
        for split in _splits(cfg, name):
            if (split.annotations, split.training) in seen:
                continue
            seen.add((split.annotations, split.training))
            content = read(split)
            check_categories(split.where, split.classes, content["categories"])
            content = {**content, "images": check_sizes(split, content["images"])}
            check_objects(split, content)
            paths = {str(split.images / image["file_name"]) for image in content["images"]}
            files[name] = files.get(name, set()) | paths
            for path in _evaluated(cfg, name):
                if path.is_file() and not path.samefile(split.annotations):
                    _check_same_images(split, content, path)
    for name in names:
        for path in _evaluated(cfg, name):
            if not path.is_file():
                raise UserError(f"{name}_evaluator: there is no annotation file '{path}'; set data_root or ann_file.")
    _warn_of_shared(cfg, files)


def _splits(cfg: Any, name: str) -> list[Split]:
    loader = cfg.get(f"{name}_dataloader")
    evaluators = _evaluators(cfg.get(f"{name}_evaluator"))
    measures = not all(each.get("format_only") for each in evaluators) if evaluators else True
    return list(splits(name, loader["dataset"] if loader else {}, measures))


def _evaluated(cfg: Any, name: str) -> list[Path]:
    return [Path(each["ann_file"]) for each in _evaluators(cfg.get(f"{name}_evaluator")) if each.get("ann_file")]


def _check_same_images(split: Split, content: Mapping[str, Any], path: Path) -> None:
    """What is measured against is of the images that are shown: ids of two files may well be alike."""
    if path.suffix != ".json":
        return
    other = read(replace(split, name=f"{split.name}_evaluator", annotations=path))
    check_categories(f"{split.name}_evaluator: '{path}'", split.classes, other["categories"])
    named = {image["id"]: image["file_name"] for image in other["images"]}
    odd = [image for image in content["images"] if named.get(image["id"]) != image["file_name"]]
    if odd:
        raise UserError(
            f"{split.name}_evaluator: '{path}' is of other images than {split.where}: image {odd[0]['id']} "
            f"('{odd[0]['file_name']}') is {named.get(odd[0]['id'], 'not')!r} there; set ann_file to the data's."
        )


def _warn_of_shared(cfg: Any, files: Mapping[str, set[str]]) -> None:
    """Says so where images are measured on that are trained on."""
    trained = {split.annotations.resolve() for split in _splits(cfg, "train") if cfg.get("train_dataloader")}
    for name in files:
        if name == "train":
            continue
        both = [split for split in _splits(cfg, name) if split.annotations.resolve() in trained]
        shared = sorted(files[name] & files.get("train", set()))
        if both:
            _logger.warning(f"{both[0].where} is what is trained on, too: AP will be that of training images")
        elif shared:
            _logger.warning(
                f"{name} data: {len(shared)} of {len(files[name])} images are trained on, too ({some(shared, 2)})"
            )


def check_classes(cfg: Any) -> None:
    """Compares the heads' `num_classes` with the number of class names.

    Raises:
        UserError: They differ.
    """
    names = {split.classes for split in _splits(cfg, "train")}
    for count, where in _num_classes(cfg.model, "model"):
        for classes in names:
            if classes and count != len(classes):
                raise UserError(
                    f"{where}.num_classes={count}, but the training data have {len(classes)} classes "
                    f"({some(classes)}); set both alike."
                )


def check_save_best(cfg: Any) -> None:
    """Compares the metric that chooses the best checkpoint with those of COCO's evaluators, before an epoch is spent.

    Raises:
        UserError: There is none of that name.
    """
    wanted = ((cfg.get("default_hooks") or {}).get("checkpoint") or {}).get("save_best")
    evaluators = _evaluators(cfg.get("val_evaluator"))
    if not wanted or not evaluators or any(each.get("type") not in METRICS for each in evaluators):
        return
    known = ["auto"]
    for each in evaluators:
        if each.get("classwise") or each.get("prefix"):
            return  # then names depend on the classes
        metrics = each.get("metric", "bbox")
        for metric in [metrics] if isinstance(metrics, str) else metrics:
            known += [f"coco/{metric}_{part}" for part in COCO_PARTS]
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in known and not name.startswith(("coco/AR@", "coco/proposal")):
            hint = did_you_mean(name, known)
            raise UserError(
                f"default_hooks.checkpoint.save_best: CocoMetric gives no '{name}'{hint}; give coco/bbox_mAP, say."
            )


def check_neck(model: nn.Module) -> None:
    """Compares what the backbone gives with what the neck takes.

    Raises:
        UserError: They differ.
    """
    model = getattr(model, "module", model)
    gives = getattr(getattr(model, "backbone", None), "out_channels", None)
    takes = getattr(getattr(model, "neck", None), "in_channels", None)
    if isinstance(gives, list) and isinstance(takes, (list, tuple)) and list(gives) != list(takes):
        raise UserError(
            f"model.neck.in_channels={list(takes)}, but the backbone gives {list(gives)} channels; set both alike."
        )


def check_weights(model: nn.Module, checkpoint: Checkpoint, *, whole: bool) -> None:
    """Compares a checkpoint's tensors with the model's.

    Args:
        model: That is to load it.
        checkpoint: As read.
        whole: Everything must fit; otherwise, as for fine-tuning, only the backbone must, and the rest is counted.

    Raises:
        UserError: It is of another architecture, or its numbers are none for the model's: complex, quantised, NaN.
    """
    state, what = checkpoint.state, checkpoint.what
    model = getattr(model, "module", model)
    own = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    odd = [key for key in own if key in state and not hasattr(state[key], "shape")]
    if odd:
        raise UserError(f"{what} holds {type(state[odd[0]]).__name__} as '{odd[0]}', a tensor was expected.")
    bad = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    stray = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    fatal = bad + stray if whole else [key for key in bad if key.startswith("backbone.")]
    if fatal:
        key = fatal[0]
        there = tuple(state[key].shape) if key in state else "nothing"
        here = tuple(own[key].shape) if key in own else "nothing"
        raise UserError(
            f"{what} is of another network{checkpoint.trained_as}: {len(fatal)} of its tensors do not fit, '{key}' is "
            f"{there} there and {here} here; give the configuration it was trained with."
        )
    problem = unfit({key: value for key, value in own.items() if key not in bad}, state)
    if problem:
        raise UserError(f"{what} cannot be loaded: {problem}; give a file of plain weights.")
    if bad:
        _logger.warning(
            f"{what}: {len(bad)} tensors outside the backbone do not fit and start anew, such as '{bad[0]}'"
        )


def _evaluators(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _num_classes(value: Any, where: str) -> Iterator[tuple[int, str]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key == "num_classes" and re.search(r"(bbox|mask)_head(\[\d+\])?$", where):
                yield each, where
            yield from _num_classes(each, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _num_classes(each, f"{where}[{index}]")
