# ruff: noqa: RUF009  (`option` returns a dataclass field, which the rule cannot see)
"""Every option of the training and the validation script, under the names that timm's own scripts use."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revnets.training.checkpoints.tree import described
from revnets.training.errors import UserError
from revnets.training.options.parsing import SEED, Need, check_values, convert, option, options_of

from .learning import AugmentationOptions, DistillationOptions, OptimizerOptions, ScheduleOptions, SparsityOptions
from .needs import AMP, FILES_WEIGHTS, OWN_WEIGHTS, PIXELS, STREAM, interpolations, is_set
from .policy import check_policy

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "classification"
PROCESSES = 1024


@dataclasses.dataclass
class DataOptions:
    """Data"""

    data_dir: str = option("", "folder with one folder per split, or a .tar file", path=True)
    dataset: str = option(
        "", "timm data set type, such as hfds/NAME; empty for folders and .tar files of class folders"
    )
    train_split: str = option("train", "folder or .tar file of the training images inside --data-dir", path=True)
    val_split: str = option("validation", "folder or .tar file of the validation images inside --data-dir", path=True)
    dataset_download: bool = option(
        False,
        "let the data set type download itself where it can",
        needs=is_set("dataset", "--dataset is not given", "add --dataset"),
    )
    class_map: str = option("", "text file of class names that fixes their order", path=True)
    img_size: int | None = option(
        None,
        "height and width of the images the network sees",
        low=1,
        high=PIXELS,
        needs=Need(lambda options: options.input_size is None, "--input-size wins over it", "leave --input-size out"),
    )
    input_size: list[int] | None = option(
        None, "channels, height and width; wins over --img-size", low=1, high=PIXELS, length=(3, 3)
    )
    in_chans: int | None = option(None, "channels of the images", low=1, high=PIXELS)
    crop_pct: float | None = option(None, "validation: part of the resized image that is kept", low=0.01, high=1)
    mean: list[float] | None = option(None, "mean of each channel, images in 0 to 1", length=(1, PIXELS))
    std: list[float] | None = option(None, "standard deviation of each channel", low=1e-6, length=(1, PIXELS))
    interpolation: str = option(
        "",
        "resampling: bilinear, bicubic, nearest; empty for the model's own",
        choices=lambda: ("", *interpolations()),
    )
    batch_size: int = option(128, "images per process and step", flags=("-b",), low=1, high=1 << 24)
    workers: int = option(
        min(4, os.cpu_count() or 1),
        "loader processes per training process; 0 loads in the training process",
        flags=("-j",),
        low=0,
        high=PROCESSES,
    )
    pin_mem: bool = option(False, "pin the loader's memory for faster copies to the GPU")
    no_prefetcher: bool = option(False, "do not use timm's prefetching loader")


@dataclasses.dataclass
class ModelOptions:
    """Model"""

    model: str = option("revbifpn_s0", "any name that timm.create_model knows, revnets' own included")
    model_kwargs: dict[str, Any] = option({}, "further arguments of the model, such as mode=reversible exact=true")
    layers: str = option("", "layers to put into the model, such as sparse_wide:0.75; `revnets layers` lists all")
    small_stem: int | None = option(
        None,
        "timm's ResNets: first convolution 3x3 of this stride, no pooling after it (32-pixel images: 1)",
        low=1,
        high=PIXELS,
    )
    num_classes: int | None = option(
        None, "size of the classifier; training counts the class folders where not given", low=1, high=1 << 24
    )
    pretrained: bool = option(False, "start from published weights", needs=(OWN_WEIGHTS, FILES_WEIGHTS))
    gp: str | None = option(None, "global pooling: avg, max, avgmax, catavgmax")


@dataclasses.dataclass
class DeviceOptions:
    """Device and precision"""

    device: str | None = option(None, "cpu, cuda, ...; cuda where there is one, else cpu, when not given")
    amp: bool = option(False, "automatic mixed precision")
    amp_dtype: str | None = option(
        None, "bfloat16 is usual on CPUs, float16 on GPUs", choices=("float16", "bfloat16"), needs=AMP
    )
    channels_last: bool = option(False, "channels-last memory layout")
    log_interval: int = option(50, "steps between two lines of the log", low=1)


@dataclasses.dataclass
class StartOptions:
    """Start and output"""

    pretrained_path: str = option("", "file to read instead of the published weights; adapts the classifier", path=True)
    initial_checkpoint: str = option(
        "",
        "weights to start from, of this model; masks are dropped where it is dense, another classifier starts anew",
        path=True,
    )
    keep_zeros: bool = option(False, "weights that are 0 at the start, as in a pruned checkpoint, stay 0")
    resume: str = option(
        "", "checkpoint to go on from, or `auto`: the newest of the output folder if there is one", path=True
    )
    no_resume_opt: bool = option(
        False,
        "do not take the optimizer's state from the checkpoint",
        needs=is_set("resume", "nothing is resumed", "add --resume"),
    )
    output: str = option("output/train", "folder for the folders of runs", path=True)
    experiment: str = option("", "name of the run's folder; <model>-<size> where not given", path=True)
    overwrite: bool = option(False, "start anew in a folder that already holds a run")
    checkpoint_hist: int = option(3, "checkpoints of the best epochs to keep", low=1)
    recovery_interval: int = option(
        0, "batches between two checkpoints in the middle of an epoch; 0: only at its end, and after SIGTERM", low=0
    )
    eval_metric: str = option("top1", "what makes an epoch the best", choices=("top1", "top5", "loss"))
    val_interval: int = option(1, "epochs between two validations", low=1)
    numerics_interval: int = option(
        0, "updates between two at which sizes and FP8 losses of all layers are noted in numerics.csv; 0: none", low=0
    )
    seed: int = option(42, "all randomness follows from it, the epoch and the process", low=0, high=SEED)
    worker_seeding: str = option("all", "seeding of loader processes", choices=("all", "part"), needs=STREAM)


@dataclasses.dataclass
class TrainOptions(
    AugmentationOptions,
    SparsityOptions,
    DistillationOptions,
    ScheduleOptions,
    OptimizerOptions,
    StartOptions,
    DeviceOptions,
    ModelOptions,
    DataOptions,
):
    """Everything that `classification/train.py` reads."""

    @property
    def mixes(self) -> bool:
        """Whether targets come as distributions over classes, from mixup or cutmix."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def check(self) -> None:
        """Refuses combinations that cannot work.

        Raises:
            UserError: Naming the options and the fix.
        """
        check_shared(self)
        check_policy(self.aa)
        if self.mixes and self.batch_size % 2:
            raise UserError(
                f"--batch-size: {self.batch_size} is odd, mixup and cutmix pair images; give an even number."
            )
        if self.aug_splits == 1:
            raise UserError(
                "--aug-splits: 1 was given where 0 or at least 2 was expected; give 3, as in the AugMix paper."
            )
        if self.jsd_loss and not self.aug_splits:
            raise UserError("--jsd-loss compares augmented copies, but --aug-splits is 0; add --aug-splits 3.")
        if self.aug_splits and self.mixes:
            raise UserError("--aug-splits and --mixup/--cutmix exclude each other; set one of them to 0.")
        if self.warmup_epochs > self.epochs and not self.warmup_prefix:
            raise UserError(
                f"--warmup-epochs: {self.warmup_epochs} is more than --epochs {self.epochs}; "
                "lower it or add --warmup-prefix."
            )
        if self.mus_base_width is not None and self.layer_decay is not None:
            raise UserError("--mus-base-width and --layer-decay both set the rates of layers; leave one of them out.")
        if self.keep_zeros and self.layers:
            raise UserError(
                f"--keep-zeros: layers of --layers {self.layers} have weights of their own; leave one of the two out."
            )
        if self.keep_zeros and (self.sparsity_schedule, self.sparsity_distribution) != ("static", "uniform"):
            raise UserError(
                "--keep-zeros: the masks of zeros stay as they are; leave --sparsity-schedule and "
                "--sparsity-distribution out."
            )
        if self.experiment and (Path(self.experiment).is_absolute() or ".." in Path(self.experiment).parts):
            raise UserError(
                f"--experiment: '{self.experiment}' leads out of --output; give the name of a folder, and --output."
            )
        if self.resume == "auto" and self.overwrite:
            raise UserError("--resume auto and --overwrite contradict each other; leave one of them out.")


@dataclasses.dataclass
class ValidateOptions(DeviceOptions, ModelOptions, DataOptions):
    """Everything that `classification/validate.py` reads."""

    checkpoint: str = option("", "checkpoint of a training; it also names the model and the data", path=True)
    use_ema: bool = option(False, "use the running mean of the weights that the checkpoint holds")
    results_file: str = option("", "write the results there too: .csv or .json", path=True)

    def check(self) -> None:
        """Refuses combinations that cannot work.

        Raises:
            UserError: Naming the options and the fix.
        """
        check_shared(self)
        if self.use_ema and not self.checkpoint:
            raise UserError("--use-ema needs the --checkpoint that holds the running mean; add it.")
        if self.results_file and not self.results_file.endswith((".csv", ".json")):
            raise UserError(f"--results-file: '{self.results_file}' ends neither in .csv nor in .json; rename it.")


def check_shared(options: TrainOptions | ValidateOptions) -> None:
    """The checks that training and validation have in common.

    Raises:
        UserError: Naming the option and the fix.
    """
    check_values(options)
    channels = options.input_size[0] if options.input_size else options.in_chans or 3
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values is not None and len(values) not in (1, channels):
            raise UserError(
                f"--{name}: {len(values)} numbers were given where {channels} (one per channel) were expected."
            )
    if channels not in (1, 3):
        flag = "--input-size" if options.input_size else "--in-chans"
        raise UserError(f"{flag}: {channels} channels were given where 1 (grey) or 3 (RGB) were expected; give 3.")
    if options.input_size and options.in_chans not in (None, channels):
        raise UserError(
            f"--in-chans: {options.in_chans} contradicts the {channels} channels of --input-size; leave it out."
        )
    if not options.data_dir and not options.dataset:
        raise UserError(
            "no data: --data-dir is not given; point it at a folder with train/ and validation/ class folders."
        )


def renamed(options: TrainOptions, *same: str, **names: str) -> dict[str, Any]:
    """Values of options as arguments of a library.

    Args:
        options: All options.
        *same: Those that are called alike there.
        **names: Of the others, by what the library calls them.
    """
    return {theirs: getattr(options, ours) for theirs, ours in {**dict(zip(same, same, strict=True)), **names}.items()}


def as_dict(options: TrainOptions | ValidateOptions) -> dict[str, Any]:
    """The options as plain values that YAML and `torch.load(weights_only=True)` can read."""
    return dataclasses.asdict(options)


def from_checkpoint_args(args: Any, source: str = "the checkpoint") -> dict[str, Any]:
    """What a validation may take over from the options that a checkpoint was trained with, checked as if given.

    Args:
        args: The `args` entry of a checkpoint; timm's own store a namespace.
        source: Option and path of the checkpoint, for messages.

    Returns:
        The values of the options that describe the model, the data and the precision.

    Raises:
        UserError: A value that its option could not have.
    """
    values = args if isinstance(args, Mapping) else getattr(args, "__dict__", {})
    known = options_of(ValidateOptions)
    wanted = {field.name for cls in (ModelOptions, DataOptions) for field in dataclasses.fields(cls)}
    wanted |= {"amp", "amp_dtype", "channels_last"}
    wanted -= {"pretrained"}
    found = {}
    for name in sorted(wanted & set(values)):
        option, value = known[name], values[name]
        if value is None and not option.optional:
            continue  # timm's way to say that it was not given
        try:
            found[name] = convert(option, value, name)
        except (UserError, TypeError, OverflowError):
            raise UserError(
                f"{source}: args.{name} is {described(value)}, {option.expected} was expected; give another checkpoint."
            ) from None
    return found
