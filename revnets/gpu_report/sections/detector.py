"""Section h: a training step of a whole detector."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...profiling.profile import measured_step
from ...profiling.target import Setting, parse_targets
from ..registry import REPORT, Column, Context, Row, Skipped
from ..rows import row_by_row

_MODES = ("reversible", "store", "checkpoint")
_CAPTURED = "reversible, backbone captured"
_PRECISIONS = ("bfloat16", "float32")
_SHOWN = "configs/detection/coco/retinanet_revbifpn-s1_1x_coco.py"
_CONFIG = """
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["revnets.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type="RevBiFPN", arch="{arch}", out_indices=(1, 2, 3)),
    neck=dict(in_channels={channels}, start_level=0, out_channels={out}),
    bbox_head=dict(in_channels={out}, feat_channels={out}, stacked_convs={convs}),
)
"""  # the model of _SHOWN, which is not there where the library was installed from a wheel
_FULL = {"arch": "s1", "channels": [80, 160, 416], "out": 256, "convs": 4}
_TINY = {"arch": "test", "channels": [16, 32, 96], "out": 16, "convs": 1}


def _plan(tiny: bool) -> list[Row]:
    rows = []
    for precision in _PRECISIONS[: 1 if tiny else 2]:
        for mode in _MODES[: 1 if tiny else 3]:
            amp = " --amp-dtype bfloat16" if precision == "bfloat16" else ""
            command = f"revnets profile {_SHOWN}@800x1333:2 --part detector --mode {mode} --device cuda --measure{amp}"
            rows.append({"mode": mode, "precision": precision, "command": command})
        here = "revnets gpu-report --sections h --output DIR"
        rows.append({"mode": _CAPTURED, "precision": precision, "command": here})
    return rows


def _words(rows: Sequence[Row]) -> str:
    return ", ".join(f"{r['mode']} {r['precision']} {r['step_ms']:.0f} ms" for r in rows if r.get("step_ms"))


@REPORT.section(
    "h",
    "detector",
    "A training step of RetinaNet with RevBiFPN-S1, two images of 800x1333, SGD",
    share=4,
    names=(Column("mode", "mode"), Column("precision", "precision")),
    figures=(
        Column("step_ms", "step, ms", "{:.1f}"),
        Column("allocated_mb", "allocated, MB", "{:.0f}"),
        Column("reserved_mb", "reserved, MB", "{:.0f}"),
        Column("note", "note"),
    ),
    plan=_plan,
    words=_words,
)
def measure(context: Context) -> Iterator[Row]:
    """Mode by mode."""
    missing = [name for name in ("mmdet", "mmengine", "mmcv", "pycocotools") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed")
    size = "64x96:1" if context.tiny else "800x1333:2"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "retinanet.py"
        path.write_text(_CONFIG.format(**(_TINY if context.tiny else _FULL)))
        yield from row_by_row(context, _plan(context.tiny), lambda row: _figures(f"{path}@{size}", row, context.device))


def _figures(name: str, row: Row, device: str) -> Row:
    setting = Setting(device, True, "bfloat16" if row["precision"] == "bfloat16" else None, True, "sgd")
    targets = parse_targets(name, setting)
    captured = row["mode"] == _CAPTURED
    mode = _MODES[0] if captured else row["mode"]
    (target,) = (t for t in targets if t.part == "detector" and t.mode == mode)
    if captured:
        target = replace(target, options=(("model.backbone.cuda_graph", True),))
    step, resident = measured_step(target, setting)
    return {
        "step_ms": 1e3 * step.seconds,
        "allocated_mb": (step.peak_bytes + resident) / 1e6,
        "reserved_mb": None if step.reserved_bytes is None else step.reserved_bytes / 1e6,
        "note": _note(device) if captured else None,
    }


def _note(device: str) -> str:
    if torch.device(device).type != "cuda":
        return "no graphs on this device: the same step, eagerly"
    return "two launches for the backbone; memory of graphs counts as reserved"
