"""torchvision's detectors; its feature extractor has its tests where it always is (tests/models/test_traced.py)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from tests.clients.steps import Case, assert_less_memory, assert_same_gradients, images, network

pytestmark = pytest.mark.slow
TARGETS = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2


class Maps(nn.Module):
    """Our maps under torchvision's names, brought to as many channels."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.net = network(features_only=True)
        self.laterals = nn.ModuleList(nn.Conv2d(c, 32, 1) for c in self.net.feature_info.channels())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {str(k): lateral(y) for k, (lateral, y) in enumerate(zip(self.laterals, self.net(x), strict=True))}


def case(kind: Any) -> Case:
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((8,), (16,), (32,), (64,)), aspect_ratios=((1.0,),) * 4)
    more: dict[str, Any] = {"anchor_generator": anchors}
    if kind is FasterRCNN:
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
        more = {"rpn_anchor_generator": anchors, "box_roi_pool": pool}
    model = kind(Maps(), num_classes=3, min_size=64, max_size=64, **more)
    return Case(model, (list(images()), TARGETS), lambda losses: sum(losses.values()))


@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet])
def test_gradients_are_those_of_store(kind: Any) -> None:
    assert_same_gradients(case(kind))


@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet])
def test_it_needs_less_memory(kind: Any) -> None:
    assert_less_memory(case(kind))
