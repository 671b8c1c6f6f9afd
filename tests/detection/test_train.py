"""What train.py makes of configurations and results, without training."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config

from detection import train as training
from detection.report import write_summary
from revnets.mm import WholeCheckpointHook
from revnets.training.errors import UserError


def runner(folder: Path, saving: list[Any], **known: str) -> Any:
    return SimpleNamespace(hooks=saving, message_hub=SimpleNamespace(runtime_info=known), work_dir=folder)


def test_the_best_row_is_that_of_the_checkpoint_hook(tmp_path: Path) -> None:
    rows = [{"epoch": 1.0, "loss": 3.0}, {"epoch": 2.0, "loss": 1.0}, {"epoch": 3.0, "loss": math.nan}]
    for name in ("best.pth", "last.pth"):
        (tmp_path / name).touch()
    best, last = str(tmp_path / "best.pth"), str(tmp_path / "last.pth")
    less = [WholeCheckpointHook(save_best="loss", rule="less")]
    assert training._best(runner(tmp_path, less, best_ckpt=best, last_ckpt=last), rows) == (rows[1], Path(best))
    gone = {"best_ckpt": str(tmp_path / "gone.pth"), "last_ckpt": last}
    assert training._best(runner(tmp_path, less, **gone), rows)[1] == Path(last)
    assert training._best(runner(tmp_path, [WholeCheckpointHook()], last_ckpt=last), rows[:2]) == (rows[1], Path(last))
    assert training._best(runner(tmp_path, less), []) == ({}, None)


def test_minimal_configurations_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: name)
    args = training.options().parse_args(["CONFIG", "--tensorboard", "--save-every", "7"])
    minimal = {"train_cfg": {"by_epoch": True, "max_epochs": 1}, "val_evaluator": {"type": "CocoMetric"}}
    cfg = Config(minimal)
    training._adapt(cfg, args)
    saving = cfg.default_hooks.checkpoint
    assert (saving.type, saving.interim, saving.save_best) == ("WholeCheckpointHook", 7, "coco/bbox_mAP")
    assert [each.type for each in cfg.visualizer.vis_backends] == ["LocalVisBackend", "TensorboardVisBackend"]
    remote = {"type": "CheckpointHook", "interval": 1, "backend_args": {"backend": "petrel"}}
    cfg = Config({**minimal, "default_hooks": {"checkpoint": remote}})
    with pytest.raises(UserError, match="--save-every: it has no effect"):
        training._adapt(cfg, args)
    training._adapt(cfg, training.options().parse_args(["CONFIG"]))
    assert cfg.default_hooks.checkpoint == remote


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    write_summary(tmp_path, {"a": math.nan, "rows": [{"b": math.inf, "c": 1.0}]})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": None, "rows": [{"b": None, "c": 1.0}]}
