"""timm's data sets and loaders, built from the options."""

from __future__ import annotations

import dataclasses
import logging
import tarfile
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import AugMixDataset, FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, RandomSampler
from torchvision.transforms import RandomCrop

from revnets.training.data.resumable import BATCH, Batches, Items, apart, resumable, seed_all
from revnets.training.errors import UserError, one_line, refused

from ..options import DataOptions, TrainOptions, ValidateOptions, renamed
from ..runtime import Runtime
from .reading import Images
from .sources import check_apart, class_map, find_source

_logger = logging.getLogger("classification")


class RepeatedDataset(Dataset[Any]):
    """A data set seen several times, so that an epoch of a small one is not over at once.

    Args:
        dataset: With a length and a `transform`.
        repeats: How many times.
    """

    def __init__(self, dataset: Any, repeats: int) -> None:
        self.dataset = dataset
        self.repeats = repeats

    @property
    def transform(self) -> Any:
        """The inner data set's transform, which timm's loader sets."""
        return self.dataset.transform

    @transform.setter
    def transform(self, value: Any) -> None:
        self.dataset.transform = value

    def __len__(self) -> int:
        return len(self.dataset) * self.repeats

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % len(self.dataset)]


class SeededMixup(FastCollateMixup):
    """timm's, which the loader calls; what it draws follows from the batch."""

    def __call__(self, batch: Any, _: Any = None) -> Any:
        """Mixes and stacks a batch."""
        if not isinstance(batch, Items):
            return super().__call__(batch, _)
        with apart():
            seed_all(BATCH, *batch.seed)
            return super().__call__(batch, _)


class SeededErasing:
    """timm's random erasing, which its loader does one batch ahead; what it draws follows from the batch.

    Args:
        inner: timm's.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seed: tuple[int, ...] = ()
        self.number = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Erases in a batch."""
        seed_all(*self.seed, self.number)
        self.number += 1
        erased: Tensor = self.inner(images)
        return erased


@dataclasses.dataclass
class TrainData:
    """The loader of the training images and what mixes them."""

    loader: Any
    mixup: Mixup | None  # mixes on the device; None where the loader does it, or nobody
    batches: Batches | None = None  # None: a stream, which can only be read from its start

    def start(self, epoch: int, done: int, off_epoch: int, rank: int) -> None:
        """Sets order and randomness of an epoch, and stops mixing from `off_epoch` on.

        Args:
            epoch: From 0.
            done: Batches to skip.
            off_epoch: 0 never stops mixing.
            rank: Of this process.
        """
        dataset: Any = self.loader.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        if self.batches is not None:
            self.batches.epoch, self.batches.skip, self.batches.rank = epoch, done, rank
            sampler = self.batches.sampler
            if hasattr(sampler, "set_epoch"):  # of several processes
                sampler.set_epoch(epoch)
            elif isinstance(sampler, RandomSampler):
                sampler.generator = torch.Generator().manual_seed(self.batches.seed + 1000003 * (epoch + 1))
            erasing = getattr(self.loader, "random_erasing", None)
            if isinstance(erasing, SeededErasing):
                erasing.seed, erasing.number = (self.batches.seed, BATCH, epoch, rank), done
        if off_epoch and epoch >= off_epoch:
            if self.mixup is not None:
                self.mixup.mixup_enabled = False
            elif hasattr(self.loader, "mixup_enabled"):
                self.loader.mixup_enabled = False


def open_dataset(options: DataOptions, split: str, training: bool, **more: Any) -> Any:
    """One split as a timm data set.

    Args:
        options: Where the data is.
        split: Its folder, .tar file or name.
        training: Whether it is for training.
        **more: Further arguments of `timm.data.create_dataset`.

    Raises:
        UserError: It is not there, not whole, or holds no images.
    """
    flag = "--train-split" if training else "--val-split"
    source, names = find_source(options, split, training), class_map(options)
    mode = "L" if options.in_chans == 1 else "RGB"
    try:
        dataset = create_dataset(
            options.dataset,
            **source,
            is_training=training,
            class_map=names,
            download=options.dataset_download,
            batch_size=options.batch_size,
            input_img_mode=mode,
            **more,
        )
    except (RuntimeError, OSError, ValueError, AssertionError, ImportError, tarfile.TarError) as error:
        where = f"{options.dataset or 'images'} in '{options.data_dir}', split '{split}'"
        raise UserError(
            f"--data-dir: cannot open {where} ({one_line(error)}); correct --data-dir or {flag}."
        ) from error
    if names is not None and "search_split" in source:
        _warn_of_unmapped(names, source, flag)
    return Images(dataset, mode) if isinstance(dataset, ImageDataset) else dataset


@dataclasses.dataclass(frozen=True)
class Splits:
    """The two data sets of a training, whose classes are the same."""

    training: Any
    validation: Any

    @classmethod
    def of(cls, options: TrainOptions) -> Splits:
        """Opens both.

        Raises:
            UserError: One is not there or not whole, they overlap, or their classes differ.
        """
        check_apart(options)
        more = {"repeats": options.epoch_repeats, "seed": options.seed}
        training = open_dataset(options, options.train_split, training=True, **more)
        validation = open_dataset(options, options.val_split, training=False)
        check_same_classes(training, validation)
        return cls(training, validation)

    def counted(self, options: TrainOptions) -> TrainOptions:
        """The options with the number of the classes, where they do not give one and it can be known."""
        names = class_names(self.training)
        if options.num_classes is None and names is not None:
            return dataclasses.replace(options, num_classes=len(names))
        return options


def _warn_of_unmapped(class_map: Mapping[str, int], source: Mapping[str, Any], flag: str) -> None:
    """Says which classes' images `--class-map` leaves out, and which of its classes have none."""
    found = class_names(create_dataset("", **source)) or []
    out, empty = sorted(set(found) - set(class_map)), sorted(set(class_map) - set(found))
    if out:
        _logger.warning(f"--class-map: images of {len(out)} classes of {flag} are left out ({', '.join(out[:5])})")
    if empty:
        _logger.warning(f"--class-map: {len(empty)} of its classes have no images in {flag} ({', '.join(empty[:5])})")


def class_names(dataset: Any) -> list[str] | None:
    """The class names of folder and .tar data sets in the order of their indices; None where they cannot be known."""
    reader = getattr(dataset, "reader", None)
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return sorted(index, key=index.__getitem__) if index else None


def check_same_classes(train: Any, validation: Any) -> None:
    """Refuses splits whose class folders differ: timm numbers them by name, so one missing folder shifts all labels.

    Raises:
        UserError: Naming the first class that differs.
    """
    ours, theirs = class_names(train), class_names(validation)
    if ours is None or theirs is None or ours == theirs:
        return
    odd = sorted(set(ours) ^ set(theirs)) or ours
    where = "only the training" if odd[0] in ours else "only the validation"
    raise UserError(
        f"--data-dir: class folder '{odd[0]}' is in {where} split, so labels would not agree; make the folders equal."
    )


def check_labels(dataset: Any, num_classes: int) -> None:
    """Refuses data with more classes than the model has outputs.

    Raises:
        UserError: Naming both numbers.
    """
    names = class_names(dataset)
    if names is not None and len(names) > num_classes:
        raise UserError(
            f"--num-classes: the data has {len(names)} classes, the model {num_classes} outputs; give {len(names)}."
        )


def train_data(
    options: TrainOptions, runtime: Runtime, dataset: Any, config: dict[str, Any], num_classes: int
) -> TrainData:
    """The training loader with its augmentation.

    Args:
        options: All options.
        runtime: Device and processes.
        dataset: From `open_dataset`.
        config: timm's data configuration.
        num_classes: For the mixed targets.

    Raises:
        UserError: Fewer images than one batch, or augmentation words that timm does not know.
    """
    if options.epoch_repeats > 1 and hasattr(dataset, "__getitem__"):
        dataset = RepeatedDataset(dataset, options.epoch_repeats)
    needed = options.batch_size * runtime.world_size
    if hasattr(dataset, "__len__") and 0 < len(dataset) < needed:
        raise UserError(f"--batch-size: {len(dataset)} training images do not fill one batch of {needed}; lower it.")
    if options.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=options.aug_splits)
    mixing = _mixing(options, num_classes) if options.mixes else None
    prefetch = not options.no_prefetcher
    collate = SeededMixup(**mixing) if mixing and prefetch else None
    same = ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob")
    erasing = {"re_prob": "reprob", "re_mode": "remode", "re_count": "recount", "re_split": "resplit"}
    augmentation = renamed(options, *same, auto_augment="aa", num_aug_splits="aug_splits", **erasing)
    augmentation["num_aug_repeats"] = options.aug_repeats if runtime.distributed else 0
    if options.train_interpolation and not options.no_aug:
        config = {**config, "interpolation": options.train_interpolation}
    with refused("augmentation: timm refuses it", "correct --aa, --scale or --ratio"):
        loader = _loader(options, runtime, dataset, config, True, collate_fn=collate, **augmentation)
    if options.crop_pad is not None:
        _crop_with_border(dataset, config["input_size"][-2:], options.crop_pad)
    loader, batches = _resumable(loader, options)
    return TrainData(loader, Mixup(**mixing) if mixing and not prefetch else None, batches)


def _resumable(loader: Any, options: TrainOptions) -> tuple[Any, Batches | None]:
    """timm's loader, on batches that can be skipped and items that are seeded, unless it reads a stream."""
    inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
    if isinstance(inner.dataset, IterableDataset):
        return loader, None
    made, batches = resumable(inner)
    batches.seed, batches.repeated = options.seed, options.aug_repeats > 0
    if not isinstance(loader, PrefetchLoader):
        return made, batches
    loader.loader = made
    if loader.random_erasing is not None:
        loader.random_erasing = SeededErasing(loader.random_erasing)
    return loader, batches


def _crop_with_border(dataset: Any, size: tuple[int, int], pad: int) -> None:
    """Puts a random crop where timm's training transforms begin with a resized one."""
    steps = getattr(dataset.transform, "transforms", None)
    if not steps or "Crop" not in type(steps[0]).__name__:
        raise UserError("--crop-pad: it replaces the random crop, and there is none; leave out --no-aug, --aug-splits.")
    steps[0] = RandomCrop(size, padding=pad)


def validation_loader(
    options: TrainOptions | ValidateOptions, runtime: Runtime, dataset: Any, config: dict[str, Any]
) -> Any:
    """The loader of the validation images: every image once, without chance."""
    return _loader(options, runtime, dataset, config, False)


def _loader(
    options: TrainOptions | ValidateOptions,
    runtime: Runtime,
    dataset: Any,
    config: dict[str, Any],
    training: bool,
    **more: Any,
) -> Any:
    return create_loader(
        dataset,
        batch_size=options.batch_size,
        is_training=training,
        **{name: config[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
        num_workers=options.workers,
        distributed=runtime.distributed,
        pin_memory=options.pin_mem,
        device=torch.device(runtime.device),
        use_prefetcher=not options.no_prefetcher,
        persistent_workers=False,  # workers that live on would carry randomness over epochs, which no resume restores
        worker_seeding=getattr(options, "worker_seeding", "all"),
        **more,
    )


def _mixing(options: TrainOptions, num_classes: int) -> dict[str, Any]:
    """The arguments of `Mixup`."""
    alphas = {"mixup_alpha": "mixup", "cutmix_alpha": "cutmix", "label_smoothing": "smoothing", "mode": "mixup_mode"}
    chances = {"prob": "mixup_prob", "switch_prob": "mixup_switch_prob"}
    return {**renamed(options, "cutmix_minmax", **alphas, **chances), "num_classes": num_classes}
