"""Where the images of a split come from, looked at before a data set is made of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from revnets.training.data.splits import TRAIN, VALIDATION, check_split, find_split, overlap, read_class_map
from revnets.training.errors import UserError, did_you_mean

from ..options import DataOptions, TrainOptions

_logger = logging.getLogger("classification")
KINDS = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")  # of timm; it takes all else for a folder
HALVES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")  # a train and a test half, and no more
FOLDERS = ("torch/folder", "torch/image_folder")


def find_source(options: DataOptions, split: str, training: bool) -> dict[str, Any]:
    """Arguments of `timm.data.create_dataset` that name a split, which is there and whole.

    Archives' headers are read anew in each run: timm would keep them in a pickle file beside large archives, which may
    be of another archive, or of somebody else.

    Args:
        options: Where the data is.
        split: Its folder, .tar file or name.
        training: Whether it is for training.

    Raises:
        UserError: It is not there, not whole, or timm would take something else for it.
    """
    flag = "--train-split" if training else "--val-split"
    if not _in_folders(options):
        _check_name(options, split, flag)
        return {"root": options.data_dir or None, "split": split}
    path = _path(options, split, flag)
    try:
        for warning in check_split(path):
            _logger.warning(f"{flag}: {warning}")
    except ValueError as error:
        raise UserError(f"{flag}: {error}; correct --data-dir or {flag}.") from error
    more = {"cache_tarinfo": False} if path.is_file() else {}
    return {"root": str(path), "split": split, "search_split": False, **more}


def class_map(options: DataOptions) -> dict[str, int] | None:
    """The classes of `--class-map`, or None.

    Raises:
        UserError: It cannot be read, names a class twice, or has no effect on this kind of data.
    """
    if not options.class_map:
        return None
    if options.dataset.startswith("torch/"):
        raise UserError(f"--class-map: it has no effect on {options.dataset}; leave it out.")
    try:
        return read_class_map(options.class_map, options.data_dir)
    except ValueError as error:
        raise UserError(f"--class-map: {error}.") from error


def check_apart(options: TrainOptions) -> None:
    """Refuses a validation on images that are trained on, unless both options say the same, which is warned of.

    Raises:
        UserError: The splits have different names, but images in common.
    """
    train, validation = options.train_split, options.val_split
    if _in_folders(options):
        shared = overlap(_path(options, train, "--train-split"), _path(options, validation, "--val-split"))
    elif _half(options) is not None:
        shared = f"both are {options.dataset}'s {'training' if train in TRAIN else 'test'} images"
        shared = shared if (train in TRAIN) == (validation in TRAIN) else ""
    else:
        shared = "both name the same images" if train == validation else ""
    if shared and train == validation:
        _logger.warning(f"--val-split: {shared}: accuracy will be that on training images, asked for by both options")
    elif shared:
        raise UserError(
            f"--val-split: {shared}, so accuracy would be that on training images; give other images, or the same name "
            "for --train-split and --val-split where that is wanted."
        )


def _in_folders(options: DataOptions) -> bool:
    return not options.dataset or options.dataset.lower() in FOLDERS


def _half(options: DataOptions) -> str | None:
    kind, _, name = options.dataset.partition("/")
    return name if kind.lower() == "torch" and name.lower() in HALVES else None


def _path(options: DataOptions, split: str, flag: str) -> Path:
    if not Path(options.data_dir).exists():
        raise UserError(
            f"--data-dir: there is no folder or .tar file '{options.data_dir}'; give the one that holds the images."
        )
    try:
        return find_split(options.data_dir, split)
    except ValueError as error:
        raise UserError(f"{flag}: {error}; correct --data-dir or {flag}.") from error


def _check_name(options: DataOptions, split: str, flag: str) -> None:
    """Refuses a kind of data that timm would take for a folder, and a split that it would take for another one."""
    if not options.dataset.lower().startswith(KINDS):
        hint = did_you_mean(options.dataset, [f"torch/{name}" for name in HALVES])
        raise UserError(
            f"--dataset: '{options.dataset}' is of no kind that timm knows{hint}; expected one of {', '.join(KINDS)} "
            "before a name, or nothing for folders and .tar files."
        )
    halves = (*TRAIN, *VALIDATION, "test")
    if _half(options) is not None and split not in halves:
        raise UserError(
            f"{flag}: {options.dataset} has no split '{split}'{did_you_mean(split, halves)}; give train or validation."
        )
