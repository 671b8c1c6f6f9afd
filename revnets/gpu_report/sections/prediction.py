"""Section d: predicted memory against measured, allocated and reserved, with autocast and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...profiling.profile import measured_step
from ...profiling.target import Setting, Target
from ..predictions import Predictions, predicting
from ..registry import REPORT, Column, Context, Row
from ..registry import Target as Promise
from ..rows import row_by_row, todo

_NETWORKS = (
    ("revbifpn_s1", 256, "reversible", 64),
    ("revbifpn_s1", 256, "store", 64),
    ("revbifpn_s3", 288, "reversible", 32),
    ("revbifpn_s0", 224, "checkpoint", 64),
    ("efficientnet_b0", 224, "store", 128),
    ("resnet50", 224, "store", 128),
    ("hrnet_w18", 224, "store", 64),
    ("convnext_tiny", 224, "store", 64),
    ("vit_small_patch16_224", 224, "store", 128),
    ("mobilenetv3_large_100", 224, "store", 128),
)
_TINY = (("test_revbifpn", 64, "reversible", 2), ("test_resnet", 64, "store", 2))
_PRECISIONS = ("bfloat16", "float32")


def _plan(tiny: bool) -> list[Row]:
    rows = []
    for precision in _PRECISIONS[: 1 if tiny else 2]:
        for name, size, mode, batch in _TINY if tiny else _NETWORKS:
            amp = " --amp-dtype bfloat16" if precision == "bfloat16" else ""
            command = (
                f"revnets profile {name}@{size}:{batch} --mode {mode} --device cuda --measure --optimizer adamw{amp}"
            )
            row = {"network": f"{name} @{size}:{batch}", "mode": mode, "precision": precision, "command": command}
            rows.append(row)
    return rows


def _largest(key: str) -> Callable[[Sequence[Row]], float | None]:
    def error(rows: Sequence[Row]) -> float | None:
        return max((abs(row[key]) for row in rows if row.get(key) is not None), default=None)

    return error


def _words(rows: Sequence[Row]) -> str:
    errors = [(name, _largest(key)(rows)) for name, key in (("allocated", "error"), ("reserved", "reserved_error"))]
    found = ", ".join(f"{name} {100 * value:.1f}%" for name, value in errors if value is not None)
    return f"largest error: {found}" if found else ""


@REPORT.section(
    "d",
    "prediction",
    "Memory predicted against measured, AdamW",
    share=9,
    names=(Column("network", "network"), Column("mode", "mode"), Column("precision", "precision")),
    figures=(
        Column("predicted_mb", "predicted, MB", "{:.1f}"),
        Column("allocated_mb", "allocated, MB", "{:.1f}"),
        Column("reserved_mb", "reserved, MB", "{:.1f}"),
        Column("error", "predicted / allocated - 1", "{:+.1%}"),
        Column("reserved_error", "predicted / reserved - 1", "{:+.1%}"),
        Column("note", "note"),
    ),
    plan=_plan,
    targets=(
        Promise("largest error of a prediction, allocated bytes", _largest("error"), most=0.05),
        Promise("largest error of a prediction, reserved bytes", _largest("reserved_error"), most=0.05),
    ),
    words=_words,
)
def measure(context: Context) -> Iterator[Row]:
    """Predicted in the background, measured in the meantime."""
    planned = _plan(context.tiny)
    with predicting(context.device, context.tiny) as predictions:
        for row in todo(context, planned):
            predictions.want(*_what(row, context.device))
        yield from row_by_row(context, planned, lambda row: _figures(predictions, *_what(row, context.device)), 3.0)


def _figures(predictions: Predictions, target: Target, setting: Setting) -> Row:
    step, resident = measured_step(target, setting)
    predicted, allocated, reserved = predictions.peak(target, setting), step.peak_bytes + resident, step.reserved_bytes
    return {
        "predicted_mb": predicted / 1e6,
        "allocated_mb": allocated / 1e6,
        "reserved_mb": None if reserved is None else reserved / 1e6,
        "error": predicted / allocated - 1,
        "reserved_error": None if reserved is None else predicted / reserved - 1,
    }


def _what(row: Row, device: str) -> tuple[Target, Setting]:
    name, _, sizes = row["network"].partition(" @")
    size, batch = map(int, sizes.split(":"))
    amp = row["precision"] if row["precision"] != "float32" else None
    return Target(name, size, batch, row["mode"]), Setting(device, True, amp, True, "adamw")
