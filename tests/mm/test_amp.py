"""Mixed precision: networks compute in bfloat16, boxes in float32."""

from typing import Any

import pytest
import torch

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from revnets.mm import Bf16OptimWrapper  # noqa: E402
from tests.detection.families import build, losses  # noqa: E402


def test_boxes_are_not_rounded() -> None:
    model = build("faster-rcnn_revbifpn-s0_digits")
    seen: dict[str, Any] = {}
    plain = model.rpn_head.predict_by_feat

    def predict(*args: Any, **more: Any) -> Any:
        found = plain(*args, **more)
        seen.update(proposals=found[0].bboxes)
        return found

    model.rpn_head.predict_by_feat = predict
    extractor = model.roi_head.bbox_roi_extractor
    extractor.roi_layers[0].register_forward_pre_hook(lambda _, args: seen.update(rois=args[1]))
    model.roi_head.bbox_head.register_forward_hook(lambda *args: seen.update(classes=args[2][0]))
    wrapper = Bf16OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        with wrapper.optim_context(model):
            losses(model)
    assert seen["proposals"].dtype == seen["rois"].dtype == torch.float32
    assert seen["classes"].dtype == torch.bfloat16
    assert len(extractor._forward_pre_hooks) == 1
