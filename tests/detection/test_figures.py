"""The figures of a run: what is written, what is said, and what a resumed run remembers."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")

from detection.progress import VALIDATIONS, Progress
from detection.report import metric_words, write_summary


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_summary_is_json_whatever_the_numbers(tmp_path: Path, odd: float) -> None:
    values = {"a": odd, "b": 1.5, "c": [odd, 2, {"d": odd}], "e": "text", "f": None, "g": (odd,)}
    text = write_summary(tmp_path, values).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text) == {"a": None, "b": 1.5, "c": [None, 2, {"d": None}], "e": "text", "f": None, "g": [None]}


def test_what_is_said_of_a_validation() -> None:
    metrics = {f"coco/{kind}_mAP{more}": 0.5 for kind in ("bbox", "segm") for more in ("", "_50", "_75", "_copypaste")}
    metrics["coco/bbox_mAP_50"] = 0.75
    assert metric_words(metrics) == "bbox AP 0.500, bbox AP50 0.750, segm AP 0.500, segm AP50 0.500"
    assert metric_words({"accuracy": 0.25}) == "accuracy 0.250"


class Hub(SimpleNamespace):
    """The part of MMEngine's message hub that checkpoints keep."""

    def update_info(self, name: str, value: Any) -> None:
        self.runtime_info[name] = value


def test_validations_of_a_resumed_run_follow_those_before(capsys: pytest.CaptureFixture[str]) -> None:
    hub = Hub(runtime_info={})
    for first in (1, 3):  # the second part is another process: only the hub is left
        progress = Progress(every=10, shown=False)
        runner = SimpleNamespace(epoch=first, iter=0, max_epochs=4, message_hub=hub)
        progress.before_train(runner)
        for epoch in (first, first + 1):
            runner.epoch, runner.iter = epoch, 10 * epoch
            progress.after_val_epoch(runner, {"coco/bbox_mAP": epoch / 10})
    assert [row["epoch"] for row in hub.runtime_info[VALIDATIONS]] == [1, 2, 3, 4]
    assert [row["coco/bbox_mAP"] for row in progress.validations] == [0.1, 0.2, 0.3, 0.4]
    assert all(isinstance(value, float) for row in progress.validations for value in row.values())
