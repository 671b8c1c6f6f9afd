"""Our detectors on a tiny backbone, and a step of theirs on two made-up images."""

from typing import Any

import torch
from torch import Tensor

from detection.config import CONFIGS, read


def build(name: str) -> Any:
    """A detector of the digits' or COCO's configurations, on the tiny backbone."""
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    model = read(str(next(CONFIGS.glob(f"[!_]*/{name}.py")))).model
    if model.backbone.type == "RevBiFPN":
        model.backbone.arch = "test"
        channels = [16, 16, 32, 96]
        model.neck.in_channels = [channels[index] for index in model.backbone.get("out_indices", range(4))]
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(model).train()


def losses(model: Any) -> Tensor:
    """The sum of the losses of one step."""
    from mmdet.testing import demo_mm_inputs

    classes = 10 if not hasattr(model, "roi_head") else model.roi_head.bbox_head.num_classes
    shapes = [(3, 64, 64)] * 2
    data = demo_mm_inputs(2, shapes, num_items=[3, 3], num_classes=classes, with_mask=True, use_box_type=False)
    data = model.data_preprocessor(data, True)
    torch.manual_seed(0)
    total: Tensor = model.parse_losses(model.loss(data["inputs"], data["data_samples"]))[0]
    return total
