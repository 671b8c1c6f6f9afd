"""COCO's figures of our scenes, by the configuration's own data set and metric: a detector that is right has 1."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")

from mmengine.config import Config
from mmengine.registry import init_default_scope


@pytest.fixture(scope="module")
def parts(tiny: Path) -> tuple[Any, Any]:
    """The validation's data set, with what is there, and a function that makes the metric."""
    from mmdet.registry import DATASETS, METRICS

    init_default_scope("mmdet")
    cfg = Config.fromfile(str(tiny))
    options = cfg.val_dataloader.dataset.copy()
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    options["pipeline"] = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "PackDetInputs", "meta_keys": keys[:4]},
    ]
    dataset = DATASETS.build(options)

    def metric() -> Any:
        made = METRICS.build(cfg.val_evaluator)
        made.dataset_meta = dataset.metainfo
        return made

    return dataset, metric


def figures(parts: tuple[Any, Any], shift: float = 0.0, label: int = 0, keep: float = 1.0) -> dict[str, float]:
    """Of a detector that finds what is there, but for a shift, a wrong class, or a share that it misses."""
    dataset, make = parts
    metric = make()
    for item in dataset:
        truth = item["data_samples"].gt_instances
        boxes = truth.bboxes.tensor if hasattr(truth.bboxes, "tensor") else truth.bboxes
        count = round(keep * len(boxes))
        found = {
            "bboxes": boxes[:count] + shift,
            "scores": torch.linspace(1.0, 0.9, count),
            "labels": (truth.labels[:count] + label) % len(dataset.metainfo["classes"]),
        }
        sample = {"img_id": item["data_samples"].img_id, "ori_shape": item["data_samples"].ori_shape}
        metric.process({}, [{**sample, "pred_instances": found}])
    return metric.evaluate(len(dataset))  # type: ignore[no-any-return]


def test_a_detector_that_is_right_has_1(parts: tuple[Any, Any]) -> None:
    found = figures(parts)
    for name in ("coco/bbox_mAP", "coco/bbox_mAP_50", "coco/bbox_mAP_75"):
        assert found[name] == pytest.approx(1.0, abs=1e-3), name


def test_what_is_wrong_costs(parts: tuple[Any, Any]) -> None:
    right, shifted = figures(parts), figures(parts, shift=3.0)
    assert shifted["coco/bbox_mAP"] < 0.9 * right["coco/bbox_mAP"]
    assert shifted["coco/bbox_mAP_75"] < shifted["coco/bbox_mAP_50"]
    assert figures(parts, shift=64.0)["coco/bbox_mAP_50"] < 0.05
    assert 0.05 < figures(parts, keep=0.5)["coco/bbox_mAP_50"] < 0.95
    assert figures(parts, label=1)["coco/bbox_mAP_50"] < 0.2
