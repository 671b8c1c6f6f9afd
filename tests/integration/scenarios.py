"""Runs that are killed: a few seconds long, with everything in them that a kill could lose."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Scenario:
    """A training run and how two of them are compared.

    Args:
        name: Also of its module's folder.
        line: The command line, for a folder of results.
        unfinished: Pattern of files while they are written.
        differing: Where two folders of results are not equal to the bit.
    """

    name: str
    line: Callable[[Path], list[str]]
    unfinished: str
    differing: Callable[[Path, Path], list[str]]

    @property
    def module(self) -> str:
        """Of the script."""
        return f"{self.name}.train"


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two values of a checkpoint are not equal to the bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [f"{path}: keys"]
        return [d for key in a for d in differing(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if not isinstance(b, (list, tuple)) or len(a) != len(b):
            return [f"{path}: length"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differing(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def classification(data: Path, epochs: int = 3, more: Sequence[str] = ()) -> Scenario:
    """A reversible network with sparse layers that change, EMA, and chance wherever there is some.

    Args:
        data: Made here where it is missing.
        epochs: Of 4 batches.
        more: Options, which come last.
    """
    from classification.digits import make_digits

    make_digits(data, size=32, limit=64)
    sparse = "--layers sparse_parallel:0.75 --sparsity-schedule rigl --sparsity-interval 3 --model-ema"
    chance = "--drop 0.2 --drop-path 0.1 --reprob 0.5 --mixup 0.2 --aa rand-m5-mstd0.5 --model-ema-decay 0.9"
    length = f"--epochs {epochs} --warmup-epochs 1 --sched-on-updates --batch-size 16 --recovery-interval 1"
    rest = f"--model test_revbifpn --opt adamw --lr 3e-3 --clip-grad 1 --workers 0 --device cpu --data-dir {data}"
    common = f"{sparse} {chance} {length} {rest} --img-size 32 --checkpoint-hist 2 --eval-metric loss".split()

    def line(folder: Path) -> list[str]:
        return [*common, *more, "--output", str(folder.parent), "--experiment", folder.name, "--resume", "auto"]

    return Scenario("classification", line, ".tmp-*", _classified)


def float16(data: Path) -> Scenario:
    """The same with a loss scaler, a loading process, and the schedule that goes by the metric."""
    line = "--amp --amp-dtype float16 --workers 1 --no-sched-on-updates --sched plateau --patience-epochs 0"
    return classification(data, more=line.split())


def _classified(a: Path, b: Path) -> list[str]:
    from classification.run.report import read_summary

    names = [sorted(path.name for path in folder.glob("*.pth.tar")) for folder in (a, b)]
    found = [] if names[0] == names[1] else [f"files {names}"]
    for name in names[0] if not found else ():
        first, second = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        for each in (first, second):
            del each["args"]["output"], each["args"]["experiment"]
        found += differing(first, second, name)
    columns = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_raw_loss", "lr")
    rows = [[[row[c] for c in columns] for row in read_summary(folder / "summary.csv")] for folder in (a, b)]
    return found + differing(*rows, "summary.csv")


CONFIG = """
_base_ = "{tiny}"
custom_imports = dict(imports=["tests.detection.short_runs"], allow_failed_imports=False)
model = dict(backbone=dict(layers=dict(type="sparse_parallel", sparsity=0.75)))
train_cfg = dict(max_epochs={epochs}, val_interval=1)
custom_hooks = [
    dict(type="SparsityHook", schedule="rigl", interval=3),
    dict(type="EMAHook", momentum=0.1),
    dict(type="LossHook", path="{losses}"),
]
"""


def detection(data: Path, epochs: int = 3) -> Scenario:
    """A detector with sparse layers that change, and EMA; it notes losses and images of every iteration.

    Args:
        data: Made here where it is missing.
        epochs: Of 4 batches.
    """
    from detection.digits import SceneOptions, make_scenes
    from tests.detection.conftest import tiny_config

    make_scenes(data / "digits", SceneOptions(train=8, val=2, test=2))
    tiny = tiny_config(data, data / "digits")

    def line(folder: Path) -> list[str]:
        own = data / f"{folder.name}.py"
        own.write_text(CONFIG.format(tiny=tiny, epochs=epochs, losses=folder.with_suffix(".jsonl")))
        return [str(own), "--work-dir", str(folder), "--draw", "0", "--save-every", "1", "--resume"]

    return Scenario("detection", line, ".tmp-*", _detected)


def _detected(a: Path, b: Path) -> list[str]:
    names = [sorted(path.name for path in folder.glob("*.pth") if path.name != "interim.pth") for folder in (a, b)]
    found = [] if names[0] == names[1] else [f"files {names}"]
    for name in names[0] if not found else ():
        first, second = (torch.load(folder / name, weights_only=False) for folder in (a, b))
        found += differing(*(_kept(each, folder) for each, folder in ((first, a), (second, b))), name)
    rows = [_rows(folder.with_suffix(".jsonl")) for folder in (a, b)]
    summaries = [json.loads((folder / "summary.json").read_text())["validations"] for folder in (a, b)]
    return found + differing(*rows, "losses and images") + differing(*summaries, "validations")


def _kept(checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All but times and paths."""
    runtime = {
        key: str(value).replace(str(folder), "") if isinstance(value, str) else value
        for key, value in checkpoint.pop("message_hub")["runtime_info"].items()
        if key not in ("cfg", "experiment_name", "eta")  # the log's
    }
    meta = checkpoint.pop("meta")
    return {**checkpoint, "runtime": runtime, "epoch": meta["epoch"], "iter": meta["iter"]}


def _rows(path: Path) -> dict[str, Any]:
    """What LossHook wrote; an iteration that a kill had repeated must have been the same again."""
    found: dict[str, Any] = {}
    for text in path.read_text().splitlines():
        row = json.loads(text)
        key = str(row.pop("iter"))
        if found.setdefault(key, row) != row:
            found[f"{key}, repeated"] = row
    return found
