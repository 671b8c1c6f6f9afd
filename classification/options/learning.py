# ruff: noqa: RUF009  (`option` returns a dataclass field, which the rule cannot see)
"""The options of what training does with a network and its data: optimizer, schedule, masks, teacher, augmentation."""

from __future__ import annotations

import dataclasses
from typing import Any

from revnets.training.options.parsing import option

from .needs import (
    AUGMENTED,
    BOTH,
    CHANGING,
    COLOURED,
    CROPPED,
    CYCLES,
    EMA,
    EPOCHS,
    ERASING,
    MIXING,
    PIXELS,
    RESAMPLED,
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


@dataclasses.dataclass
class OptimizerOptions:
    """Optimizer"""

    opt: str = option("sgd", "any name of timm.optim.list_optimizers()")
    opt_eps: float | None = option(None, "epsilon of the optimizer", low=0, zero=True, needs=optimizer("eps"))
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
    memory_budget: str = option(
        "",
        "bytes of a training step, such as 6GB, for weights, gradients, optimizer state and activations; each block of "
        "the network then keeps as little as that takes",
        needs=is_unset("grad_checkpointing", "--grad-checkpointing says itself what is kept"),
    )
    cuda_graph: bool = option(False, "replay training steps as one CUDA graph (one GPU; SGD, Adam or AdamW)")
    sync_bn: bool = option(False, "batch statistics over all processes (GPU)")
    dist_bn: str = option(
        "reduce", "after an epoch, running statistics of all processes", choices=("reduce", "broadcast", "none")
    )
    no_ddp_bb: bool = option(False, "do not send buffers to all processes at each step")
    model_ema: bool = option(False, "keep a running mean of the weights, and choose the best epoch by it")
    model_ema_decay: float = option(0.9998, "decay of that mean", low=0, high=1, zero=True, needs=EMA)
    model_ema_warmup: bool = option(False, "let the decay rise to its value", needs=EMA)
    model_ema_force_cpu: bool = option(False, "keep that mean in CPU memory", needs=EMA)


@dataclasses.dataclass
class SparsityOptions:
    """Masks of sparse layers"""

    sparsity_schedule: str = option(
        "static", "how masks change: not, at random, or by gradient", choices=("static", "set", "rigl"), needs=SPARSE
    )
    sparsity_interval: int = option(100, "updates between two changes of the masks", low=1, needs=CHANGING)
    sparsity_start: float = option(
        0.0, "start of the changes, as a fraction of the training", low=0, high=1, needs=CHANGING
    )
    sparsity_end: float = option(
        0.75, "end of the changes, as a fraction of the training", low=0, high=1, zero=True, needs=CHANGING
    )
    sparsity_drop_fraction: float = option(
        0.3, "share of the weights exchanged at the start", low=0.001, high=1, needs=CHANGING
    )
    sparsity_distribution: str = option(
        "uniform",
        "how the sparsity is shared out among the layers; er and erk keep the number of weights, not the FLOPs",
        choices=("uniform", "er", "erk"),
        needs=SPARSE,
    )
    sparse_kernel: bool = option(
        False, "sparse convolutions and linear layers on our CPU kernel, which skips zeros, where it pays"
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
    lr_cycle_decay: float = option(0.5, "cosine cycles: height factor", low=0, zero=True, needs=CYCLES)
    lr_cycle_limit: int = option(
        1, "cosine cycles: number", low=1, high=EPOCHS, needs=schedule("cosine", "tanh", "poly")
    )
    lr_k_decay: float = option(1.0, "cosine and poly: k-decay", above=0, needs=schedule("cosine", "poly"))
    warmup_lr: float = option(1e-5, "rate at the start of the warm-up", low=0, zero=True, needs=WARMUP)
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
    decay_rate: float = option(
        0.1, "step: factor", low=0, zero=True, needs=schedule("step", "multistep", "plateau", "poly")
    )
    patience_epochs: int = option(
        10, "plateau: epochs without progress before a decay", low=0, high=EPOCHS, zero=True, needs=schedule("plateau")
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
    color_jitter: float = option(0.4, "strength of colour jitter", low=0, needs=COLOURED)
    color_jitter_prob: float | None = option(
        None,
        "probability of colour jitter",
        low=0,
        high=1,
        needs=(*COLOURED, is_set("color_jitter", "--color-jitter is 0", "raise it")),
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
        zero=True,
        needs=is_set("bce_loss", "--bce-loss is not given", "add --bce-loss"),
    )
    reprob: float = option(0.0, "random erasing: probability", low=0, high=1, needs=AUGMENTED)
    remode: str = option("pixel", "random erasing: filling", choices=("const", "rand", "pixel"), needs=ERASING)
    recount: int = option(1, "random erasing: regions", low=1, high=1000, needs=ERASING)
    resplit: bool = option(False, "do not erase in the first split", needs=(ERASING, SPLITS))
    mixup: float = option(0.0, "mixup alpha; 0 is off", low=0)
    cutmix: float = option(
        0.0, "cutmix alpha; 0 is off", low=0, needs=is_unset("cutmix_minmax", "--cutmix-minmax wins over it")
    )
    cutmix_minmax: list[float] | None = option(
        None, "cutmix: lowest and highest side, instead of alpha", low=0, high=1, length=(2, 2), ascending=True
    )
    mixup_prob: float = option(1.0, "probability of mixup or cutmix", low=0, high=1, needs=MIXING)
    mixup_switch_prob: float = option(
        0.5, "probability of cutmix where both are on", low=0, high=1, zero=True, needs=BOTH
    )
    mixup_mode: str = option("batch", "draw per", choices=("batch", "pair", "elem"), needs=MIXING)
    mixup_off_epoch: int = option(0, "stop mixup at this epoch; 0 never does", low=0, needs=MIXING)
    smoothing: float = option(0.1, "label smoothing", low=0, high=0.999)
    train_interpolation: str = option(
        "random", "resampling of training images", choices=lambda: ("random", "", *interpolations()), needs=RESAMPLED
    )
    drop: float | None = option(
        None, "dropout before the classifier; the model's own where not given", low=0, high=0.999
    )
    drop_path: float | None = option(None, "stochastic depth; the model's own where not given", low=0, high=0.999)
