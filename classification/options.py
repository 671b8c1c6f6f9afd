# ruff: noqa: RUF009  (`option` returns a dataclass field, which the rule cannot see)
"""Every option of the training and the validation script, under the names that timm's own scripts use."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classification.needs import (
    AMP,
    AUGMENTED,
    BOTH,
    CROPPED,
    CYCLES,
    EMA,
    ERASING,
    MIXING,
    SCALED_RATE,
    SCHEDULED,
    SEVERAL,
    SPARSE,
    SPLITS,
    TEACHER,
    WARMUP,
    interpolations,
    is_set,
    is_unset,
    optimizer,
    schedule,
)
from revnets.training.errors import UserError
from revnets.training.options import SEED, Need, check_values, convert, option, options_of
from revnets.training.tree import shown

PIXELS = 1 << 16  # of a side
EPOCHS = 100_000
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
    pretrained: bool = option(False, "start from published weights")
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
    worker_seeding: str = option("all", "seeding of loader processes", choices=("all", "part"))


@dataclasses.dataclass
class OptimizerOptions:
    """Optimizer"""

    opt: str = option("sgd", "any name of timm.optim.list_optimizers()")
    opt_eps: float | None = option(None, "epsilon of the optimizer", low=0, needs=optimizer("eps"))
    opt_betas: list[float] | None = option(
        None, "betas of the optimizer", low=0, below=1, length=(2, 3), needs=optimizer("betas")
    )
    opt_kwargs: dict[str, Any] = option({}, "further arguments of the optimizer")
    momentum: float = option(0.9, "momentum", low=0, below=1, needs=optimizer("momentum"))
    weight_decay: float = option(2e-5, "weight decay; not on biases and norms", low=0)
    mus_base_width: float | None = option(
        None,
        "munit-scaled models: width at which --lr was found; hidden layers get lr * sqrt(it / their width), and "
        "--weight-decay is the share of a weight that a step at the peak rate takes off",
        low=1e-9,
    )
    layer_decay: float | None = option(
        None, "factor of the learning rate per layer, from the last to the first", above=0
    )
    clip_grad: float | None = option(None, "gradient clipping", low=0)
    clip_mode: str = option(
        "norm",
        "what to clip",
        choices=("norm", "value", "agc"),
        needs=is_set("clip_grad", "--clip-grad is not given", "add --clip-grad 1"),
    )
    nonfinite_limit: int = option(
        10, "updates in a row that are skipped for a loss or gradients that are not finite; 0 does not look", low=0
    )
    drift_interval: int = option(
        500, "steps between two looks at how well a reversible model rebuilds its activations; 0 does not look", low=0
    )
    grad_accum_steps: int = option(1, "batches per update of the weights", low=1, high=1 << 24)
    grad_checkpointing: bool = option(False, "checkpoint activations, in models that have timm's switch for it")
    cuda_graph: bool = option(False, "replay training steps as one CUDA graph (one GPU; SGD, Adam or AdamW)")
    sync_bn: bool = option(False, "batch statistics over all processes (GPU)")
    dist_bn: str = option(
        "reduce", "after an epoch, running statistics of all processes", choices=("reduce", "broadcast", "none")
    )
    no_ddp_bb: bool = option(False, "do not send buffers to all processes at each step")
    model_ema: bool = option(False, "keep a running mean of the weights, and choose the best epoch by it")
    model_ema_decay: float = option(0.9998, "decay of that mean", low=0, high=1, needs=EMA)
    model_ema_warmup: bool = option(False, "let the decay rise to its value", needs=EMA)
    model_ema_force_cpu: bool = option(False, "keep that mean in CPU memory", needs=EMA)


@dataclasses.dataclass
class SparsityOptions:
    """Masks of sparse layers"""

    sparsity_schedule: str = option(
        "static", "how masks change: not, at random, or by gradient", choices=("static", "set", "rigl"), needs=SPARSE
    )
    sparsity_interval: int = option(100, "updates between two changes of the masks", low=1, needs=SPARSE)
    sparsity_start: float = option(
        0.0, "start of the changes, as a fraction of the training", low=0, high=1, needs=SPARSE
    )
    sparsity_end: float = option(0.75, "end of the changes, as a fraction of the training", low=0, high=1, needs=SPARSE)
    sparsity_drop_fraction: float = option(
        0.3, "share of the weights exchanged at the start", low=0.001, high=1, needs=SPARSE
    )
    sparsity_distribution: str = option(
        "uniform",
        "how the sparsity is shared out among the layers; er and erk keep the number of weights, not the FLOPs",
        choices=("uniform", "er", "erk"),
        needs=SPARSE,
    )
    sparse_kernel: bool = option(
        False, "sparse 1x1 convolutions and linear layers on our CPU kernel, which skips zeros"
    )


@dataclasses.dataclass
class DistillationOptions:
    """Distillation from a teacher"""

    teacher: str = option("", "model that teaches; the student's own where only --teacher-checkpoint is given")
    teacher_checkpoint: str = option("", "its weights, such as those of the dense network before pruning", path=True)
    teacher_kwargs: dict[str, Any] = option(
        {},
        "further arguments of a teacher that is not the student's own model",
        needs=is_set("teacher", "--teacher is not given", "add --teacher"),
    )
    distill_task: float = option(1.0, "weight of the loss on the labels", low=0, needs=TEACHER)
    distill_logits: float = option(
        1.0, "weight of the Kullback-Leibler divergence of the outputs", low=0, needs=TEACHER
    )
    distill_temperature: float = option(
        2.0,
        "softens both outputs",
        low=0.01,
        needs=(TEACHER, is_set("distill_logits", "--distill-logits is 0", "raise it")),
    )
    distill_features: float = option(1.0, "weight of SquareHead, the relative error of features", low=0, needs=TEACHER)
    distill_layers: list[str] = option(
        [],
        "modules whose outputs are the features, such as blocks.*; those of timm's feature_info where not given",
        needs=(TEACHER, is_set("distill_features", "--distill-features is 0", "raise it")),
    )


@dataclasses.dataclass
class ScheduleOptions:
    """Learning-rate schedule"""

    epochs: int = option(300, "epochs, warm-up included unless --warmup-prefix", low=1, high=EPOCHS)
    epoch_repeats: int = option(1, "passes over the training set that count as one epoch", low=1, high=1 << 24)
    sched: str = option("cosine", "timm schedule: cosine, step, multistep, poly, tanh, plateau, none")
    sched_on_updates: bool = option(
        False,
        "change the rate at each update instead of each epoch",
        needs=SCHEDULED,
    )
    lr: float | None = option(None, "learning rate; from --lr-base and the batch size where not given", low=0)
    lr_base: float = option(0.1, "learning rate for a global batch of --lr-base-size", low=0, needs=SCALED_RATE)
    lr_base_size: int = option(256, "see --lr-base", low=1, needs=SCALED_RATE)
    lr_base_scale: str = option(
        "", "linear or sqrt; by optimizer where not given", choices=("", "linear", "sqrt"), needs=SCALED_RATE
    )
    lr_cycle_mul: float = option(1.0, "cosine cycles: length factor", above=0, needs=CYCLES)
    lr_cycle_decay: float = option(0.5, "cosine cycles: height factor", low=0, needs=CYCLES)
    lr_cycle_limit: int = option(
        1, "cosine cycles: number", low=1, high=EPOCHS, needs=schedule("cosine", "tanh", "poly")
    )
    lr_k_decay: float = option(1.0, "cosine and poly: k-decay", low=0, needs=schedule("cosine", "poly"))
    warmup_lr: float = option(1e-5, "rate at the start of the warm-up", low=0, needs=WARMUP)
    min_lr: float = option(
        0.0, "lowest rate", low=0, needs=schedule("cosine", "tanh", "poly", "plateau", "wsd", "rsqrt")
    )
    warmup_epochs: int = option(5, "epochs of rising rate", low=0, high=EPOCHS, needs=WARMUP[0])
    warmup_prefix: bool = option(False, "do not count the warm-up in --epochs", needs=WARMUP)
    cooldown_epochs: int = option(
        0,
        "epochs at the lowest rate at the end",
        low=0,
        high=EPOCHS,
        needs=SCHEDULED,
    )
    decay_epochs: float = option(
        90.0, "step: epochs between two decays", above=0, needs=schedule("step", "wsd", "rsqrt")
    )
    decay_milestones: list[int] = option(
        [90, 180, 270],
        "multistep: epochs of the decays",
        low=0,
        length=(1, 1000),
        ascending=True,
        needs=schedule("multistep"),
    )
    decay_rate: float = option(0.1, "step: factor", low=0, needs=schedule("step", "multistep", "plateau", "poly"))
    patience_epochs: int = option(
        10, "plateau: epochs without progress before a decay", low=0, high=EPOCHS, needs=schedule("plateau")
    )


@dataclasses.dataclass
class AugmentationOptions:
    """Augmentation and regularisation"""

    no_aug: bool = option(False, "no random transforms at all")
    scale: list[float] = option(
        [0.08, 1.0], "range of the area of random crops", above=0, length=(2, 2), ascending=True, needs=CROPPED
    )
    ratio: list[float] = option(
        [3 / 4, 4 / 3],
        "range of the aspect ratio of random crops",
        above=0,
        length=(2, 2),
        ascending=True,
        needs=CROPPED,
    )
    train_crop_mode: str | None = option(
        None, "random crop: rrc, rkrc or rkrr", choices=("rrc", "rkrc", "rkrr"), needs=CROPPED
    )
    crop_pad: int | None = option(
        None, "random crop of the image with this many pixels of border, instead of a resized crop", low=0, high=PIXELS
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1, needs=AUGMENTED)
    vflip: float = option(0.0, "probability of a vertical flip", low=0, high=1, needs=AUGMENTED)
    color_jitter: float = option(0.4, "strength of colour jitter", low=0, needs=AUGMENTED)
    color_jitter_prob: float | None = option(
        None,
        "probability of colour jitter",
        low=0,
        high=1,
        needs=(AUGMENTED, is_set("color_jitter", "--color-jitter is 0", "raise it")),
    )
    aa: str | None = option(None, "AutoAugment policy, such as rand-m9-mstd0.5", needs=AUGMENTED)
    aug_repeats: int = option(0, "repeated augmentation, with several processes", low=0, high=1000, needs=SEVERAL)
    aug_splits: int = option(0, "AugMix splits (0, or 2 and more)", low=0, high=100)
    jsd_loss: bool = option(False, "Jensen-Shannon divergence over the splits")
    bce_loss: bool = option(False, "binary cross-entropy", needs=is_unset("jsd_loss", "--jsd-loss is the loss"))
    bce_target_thresh: float | None = option(
        None,
        "binary cross-entropy: targets above this count as 1",
        low=0,
        high=1,
        needs=is_set("bce_loss", "--bce-loss is not given", "add --bce-loss"),
    )
    reprob: float = option(0.0, "random erasing: probability", low=0, high=1)
    remode: str = option("pixel", "random erasing: filling", choices=("const", "rand", "pixel"), needs=ERASING)
    recount: int = option(1, "random erasing: regions", low=1, high=1000, needs=ERASING)
    resplit: bool = option(False, "do not erase in the first split", needs=(ERASING, SPLITS))
    mixup: float = option(0.0, "mixup alpha; 0 is off", low=0)
    cutmix: float = option(0.0, "cutmix alpha; 0 is off", low=0)
    cutmix_minmax: list[float] | None = option(
        None, "cutmix: lowest and highest side, instead of alpha", low=0, high=1, length=(2, 2), ascending=True
    )
    mixup_prob: float = option(1.0, "probability of mixup or cutmix", low=0, high=1, needs=MIXING)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", low=0, high=1, needs=BOTH)
    mixup_mode: str = option("batch", "draw per", choices=("batch", "pair", "elem"), needs=MIXING)
    mixup_off_epoch: int = option(0, "stop mixup at this epoch; 0 never does", low=0, needs=MIXING)
    smoothing: float = option(0.1, "label smoothing", low=0, high=0.999)
    train_interpolation: str = option(
        "random", "resampling of training images", choices=lambda: ("random", "", *interpolations()), needs=AUGMENTED
    )
    drop: float | None = option(
        None, "dropout before the classifier; the model's own where not given", low=0, high=0.999
    )
    drop_path: float | None = option(None, "stochastic depth; the model's own where not given", low=0, high=0.999)


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
                f"{source}: args.{name} is {shown(value)}, {option.expected} was expected; give another checkpoint."
            ) from None
    return found
