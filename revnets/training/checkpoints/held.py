"""What a checkpoint must hold: of weights alone, of a run of classification, and of a runner of MMEngine.

Entries that are not named here are passed over. What a file must hold to fit the network and the optimizer at hand is
in ``fitting``.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .schema import (
    ANYTHING,
    COUNT,
    FLAG,
    NOTHING,
    TEXT,
    Array,
    Either,
    Items,
    Kind,
    Mapped,
    Number,
    Record,
    Row,
    Such,
    optional,
)

WITHOUT_STATE = "without_state"
"""Under this name the state of an optimizer says which parameters have none, as those that never got a gradient."""
AVERAGED = ("state_dict_ema", "model_ema")
MAX_EPOCHS = 1_000_000
FLOPS = "flops_of_all_phases"
"""Under this name a checkpoint holds the FLOPs of the trainings that its weights come from."""


class _Options(Kind):
    """Options of a training: a mapping, or timm's namespace."""

    words = "a mapping of options"

    def takes(self, value: Any) -> bool:
        return value is None or isinstance(value, (Mapping, Namespace))

    def check(self, value: Any, path: tuple[Any, ...] = ()) -> None:
        super().check(value, path)
        Mapped(TEXT, ANYTHING).check(vars(value) if isinstance(value, Namespace) else value or {}, path)


def _epochs_of_position(checkpoint: Mapping[str, Any]) -> str:
    position, epoch = checkpoint.get("position"), checkpoint["epoch"]
    if position is None:
        return "" if epoch >= 0 else f"has epoch {epoch} and no position in one, an epoch of at least 0 was expected"
    if position["epoch"] != epoch + 1:
        return f"has epoch {epoch} and a position in epoch {position['epoch']}, one in epoch {epoch + 1} was expected"
    return ""


def _steps_of_position(position: Mapping[str, Any]) -> str:
    step, steps = position["step"], position["steps"]
    return f"is of batch {step} in an epoch of {steps}, at most {steps} was expected" if step > steps else ""


def _columns(history: Mapping[str, Tensor]) -> str:
    changes = len(history["step"])
    odd = [name for name, column in history.items() if isinstance(column, Tensor) and column.shape[:1] != (changes,)]
    return f"has another number of rows for '{odd[0]}' than for 'step', the same was expected" if odd else ""


def _missing(scaler: Mapping[str, Any]) -> str:
    missing = [name for name in _SCALER if name not in scaler]
    return f"has no {missing[0]}, all of a loss scaler's numbers were expected" if missing else ""


def _generator(state: Tensor) -> str:
    try:
        torch.Generator().set_state(state.cpu())
    except (RuntimeError, TypeError) as error:
        return f"is no state of a generator of random numbers ({str(error).splitlines()[0][:80]})"
    return ""


_EPOCH = Number(0, MAX_EPOCHS, whole=True)
_LOOSE = Number(finite=False)  # a mean that became NaN is saved, too
WEIGHTS = Mapped(TEXT, Array(finite="weights"), "a mapping of names to tensors", filled=True)
_BUFFERS = Mapped(TEXT, Array())  # they are compared with the network's

WEIGHTS_FILE = Record(
    {"state_dict": WEIGHTS},
    {
        **{name: optional(Mapped(TEXT, Array(finite="weights"), WEIGHTS.words)) for name in AVERAGED},
        "arch": optional(TEXT),
        "args": _Options(),
        FLOPS: Number(0),
    },
)
"""Of a file whose weights are read: published ones, timm's, pruned ones, or those of a run."""

_SIZE = Number(1, whole=True)
TRAINED = Record(
    {},
    {
        "model": TEXT,
        "model_kwargs": optional(Mapped(TEXT, ANYTHING)),
        "num_classes": optional(COUNT),
        "gp": optional(TEXT),
        "small_stem": optional(_SIZE),
        "img_size": optional(_SIZE),
        "input_size": optional(Items(_SIZE, 3)),
        "in_chans": optional(_SIZE),
        "mean": optional(Items(Number())),
        "std": optional(Items(Number(0, above=True))),
        "crop_pct": optional(Number(0, above=True)),
        "interpolation": optional(TEXT),
    },
)
"""Of the options in a file whose network is built from them."""

OPTIMIZER = Record(
    {
        "state": Mapped(COUNT, Mapped(TEXT, ANYTHING)),
        "param_groups": Items(Record({"params": Items(COUNT)}, {})),
    },
    {WITHOUT_STATE: Items(COUNT)},
)

_SCALER: dict[str, Kind] = {
    "scale": Number(0, above=True),
    "growth_factor": Number(1, above=True),
    "backoff_factor": Number(0, 1, above=True),
    "growth_interval": Number(1, whole=True),
    "_growth_tracker": COUNT,
}
SCALER = Such(Record({}, _SCALER), lambda state: _missing(state) if state else "")  # a disabled one saves nothing

GUARD = Record({}, {"skipped": COUNT, "in_a_row": COUNT})

SPARSITY = Record(
    {
        "schedule": TEXT,
        "steps": COUNT,
        "leaky": FLAG,
        "generator": Such(Array(dtypes="whole", dim=1), _generator),
        "layers": Mapped(TEXT, Items(COUNT), filled=True),
        "history": Such(
            Record(
                {
                    "step": Array(dtypes="whole", dim=1),
                    "fraction": Array(dtypes="floating", dim=1, finite="all"),
                    **{name: Array(dtypes="whole") for name in ("exchanged", "changed", "active")},
                }
            ),
            _columns,
        ),
    },
    {"blocks": Mapped(TEXT, COUNT)},  # of layers whose zeros come in blocks
)

_PATIENCE: dict[str, Kind] = {
    "best": _LOOSE,  # infinite before the first
    "last_epoch": Number(-1, MAX_EPOCHS, whole=True),
    "num_bad_epochs": COUNT,
    "cooldown_counter": Number(-MAX_EPOCHS, MAX_EPOCHS, whole=True),
}

RUN = Such(
    Record(
        {"epoch": Number(-1, MAX_EPOCHS, whole=True), "optimizer": OPTIMIZER},
        {
            "version": optional(COUNT),
            "metric": optional(_LOOSE),
            "position": optional(
                Such(
                    Record(
                        {"epoch": _EPOCH, "step": COUNT, "steps": Number(1, whole=True)},
                        {"loss_sum": _LOOSE, "loss_count": Number(0)},
                    ),
                    _steps_of_position,
                )
            ),
            "history": optional(
                Record(
                    {},
                    {
                        "files": Items(Row((TEXT, optional(Number())))),
                        "best_epoch": optional(_EPOCH),
                        "best_metric": optional(Number()),
                    },
                )
            ),
            "processes": Items(
                Record({"buffers": Mapped(TEXT, _BUFFERS), "loss": Row((_LOOSE, Number(0)))}),
            ),
            "scheduler": Record({}, _PATIENCE),
            "amp_scaler": SCALER,
            "sparsity": SPARSITY,
            "guard": GUARD,
        },
    ),
    _epochs_of_position,
)
"""Of a file that a run of classification goes on from; besides what ``WEIGHTS_FILE`` says."""

_SCHEDULER = Record(
    {},
    {
        "last_step": Number(-1, whole=True),
        "_global_step": Number(-1, whole=True),
        "_last_value": Items(Number()),
        "begin": Number(),
        "end": Number(finite=False),
        "by_epoch": FLAG,
        "param_name": TEXT,
    },
)
_SCHEDULERS = Items(_SCHEDULER)

RUNNER = Record(
    {
        "meta": Record(
            {"epoch": _EPOCH, "iter": COUNT},
            {
                "seed": optional(Number(0, 2**32 - 1, whole=True)),
                "cfg": TEXT,
                "experiment_name": optional(TEXT),
                "dataset_meta": optional(Mapped(TEXT, ANYTHING)),
            },
        ),
        "state_dict": WEIGHTS,
        "message_hub": Record(
            {
                "log_scalars": Mapped(TEXT, ANYTHING),
                "runtime_info": Record(
                    {},
                    {
                        "iter": Number(-1, whole=True),
                        "epoch": Number(-1, MAX_EPOCHS, whole=True),
                        "max_iters": COUNT,
                        "max_epochs": COUNT,
                        "last_ckpt": optional(TEXT),
                        "best_ckpt": optional(TEXT),
                        "best_score": optional(_LOOSE),
                        "keep_ckpt_ids": Items(COUNT),
                        "validated_epoch": COUNT,
                        "batches_of_an_epoch": Number(1, whole=True),
                        "updates_left_out": GUARD,
                    },
                ),
                "resumed_keys": Mapped(TEXT, FLAG),
            }
        ),
        "optimizer": Mapped(TEXT, ANYTHING),  # of one optimizer, see OPTIMIZER, or a mapping of several
    },
    {
        "ema_state_dict": Mapped(TEXT, Either((Array(), NOTHING)), WEIGHTS.words),
        "param_schedulers": Either((_SCHEDULERS, Mapped(TEXT, _SCHEDULERS))),
        "processes": Items(Record({"model": _BUFFERS}, {"ema": _BUFFERS})),
        "sparsity": SPARSITY,
    },
)
"""Of a file that MMEngine's runner goes on from."""
