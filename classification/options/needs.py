"""What options of a training need to have an effect; see `revnets.training.options` for the rule."""

from __future__ import annotations

from typing import Any

from timm.optim import get_optimizer_info
from timm.utils.distributed import is_distributed_env
from torchvision.transforms import InterpolationMode

from revnets.training.options.parsing import Need

PIXELS = 1 << 16  # of a side
EPOCHS = 100_000


def interpolations() -> tuple[str, ...]:
    """The ways of resampling that timm knows."""
    return tuple(mode.value for mode in InterpolationMode if mode.value != "nearest-exact")


def is_set(name: str, lack: str, fix: str) -> Need:
    """Needs another option to be set, to anything but 0, false, none or nothing."""
    return Need(lambda options: getattr(options, name), lack, fix)


def is_unset(name: str, lack: str) -> Need:
    """Needs another option not to be set."""
    return Need(lambda options: not getattr(options, name), lack, f"leave --{name.replace('_', '-')} out")


def schedule(*names: str) -> Need:
    """Needs one of these schedules, or one that is not known here."""
    known = ("cosine", "tanh", "poly", "step", "multistep", "plateau", "wsd", "rsqrt", "constant", "none")
    return Need(
        lambda options: options.sched in names or options.sched not in known,
        "--sched {sched} does not read it",
        f"give --sched {names[0]}",
    )


def optimizer(what: str) -> Need:
    """Needs an optimizer that has it; timm drops it without a word otherwise."""

    def holds(options: Any) -> bool:
        try:
            return bool(getattr(get_optimizer_info(options.opt.split("_")[-1]), f"has_{what}", True))
        except ValueError:  # no such optimizer, which is said later
            return True

    return Need(holds, f"--opt {{opt}} has no {what}", "give another --opt")


AMP = is_set("amp", "--amp is not given", "add --amp")
MIXING = Need(lambda options: options.mixes, "neither mixup nor cutmix is on", "add --mixup 0.2 or --cutmix 1")
BOTH = Need(
    lambda options: options.mixup > 0 and (options.cutmix > 0 or options.cutmix_minmax),
    "mixup and cutmix are not both on",
    "add --mixup 0.2 --cutmix 1",
)
ERASING = is_set("reprob", "--reprob is 0", "add --reprob 0.25")
SPLITS = is_set("aug_splits", "--aug-splits is 0", "add --aug-splits 3")
AUGMENTED = is_unset("no_aug", "--no-aug takes all random transforms out")
RESAMPLED = (
    AUGMENTED,
    Need(
        lambda options: options.crop_pad is None or options.aa, "--crop-pad resamples nothing", "leave --crop-pad out"
    ),
)
COLOURED = (
    AUGMENTED,
    Need(lambda options: not options.aa or "3a" in options.aa, "timm leaves it out with --aa {aa}", "leave --aa out"),
)
CROPPED = (AUGMENTED, Need(lambda options: options.crop_pad is None, "--crop-pad replaces it", "leave --crop-pad out"))
EMA = is_set("model_ema", "--model-ema is not given", "add --model-ema")
TEACHER = Need(
    lambda options: options.teacher or options.teacher_checkpoint, "there is no teacher", "add --teacher-checkpoint"
)
SPARSE = Need(
    lambda options: options.layers or options.model_kwargs.get("layers") or options.keep_zeros,
    "{model} has no sparse layers",
    "add --layers sparse_wide:0.75, say",
    in_files=False,
)
CHANGING = (
    SPARSE,
    Need(
        lambda options: options.sparsity_schedule != "static",
        "--sparsity-schedule static keeps the masks as they are",
        "give --sparsity-schedule rigl",
        in_files=False,
    ),
)
SEVERAL = Need(lambda options: is_distributed_env(), "there is one process", "start it with torchrun")
STREAM = Need(
    lambda options: options.dataset, "images of folders and .tar files have seeds of their own", "leave it out"
)
OWN_WEIGHTS = Need(
    lambda options: not getattr(options, "initial_checkpoint", ""),
    "--initial-checkpoint replaces all weights",
    "leave --initial-checkpoint out",
)
FILES_WEIGHTS = Need(
    lambda options: not getattr(options, "checkpoint", ""),
    "--checkpoint replaces all weights",
    "leave --checkpoint out",
)
SCALED_RATE = Need(lambda options: options.lr is None, "--lr {lr} wins over it", "leave --lr out")
CYCLES = (
    schedule("cosine", "tanh", "poly"),
    Need(lambda options: options.lr_cycle_limit > 1, "there is one cycle", "add --lr-cycle-limit 2"),
)
SCHEDULED = Need(lambda options: options.sched != "none", "--sched none does not read it", "give --sched cosine")
WARMUP = (
    SCHEDULED,
    is_set("warmup_epochs", "--warmup-epochs is 0", "add --warmup-epochs 5"),
)
