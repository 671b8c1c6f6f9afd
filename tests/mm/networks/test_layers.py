"""Sparse and munit-scaled convolutions by name in MMDetection's models."""

from typing import Any

import pytest
import torch

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
mm = pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from revnets.layers.munit.layers import MunitScaled  # noqa: E402
from revnets.mm.networks.layers import CONV_LAYERS, register_conv_layers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")


def test_registering_again_is_harmless() -> None:
    register_conv_layers()


@pytest.mark.parametrize("kind", CONV_LAYERS)
def test_conv_cfg(kind: str) -> None:
    models = pytest.importorskip("mmdet.models", reason=REASON)
    cfg: dict[str, Any] = {"type": kind}
    if "Sparse" in kind:
        cfg["sparsity"] = 0.75
    if "MuS" in kind:
        cfg["fp8"] = True
    net = models.ResNet(18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1), conv_cfg=cfg)
    net.init_weights()
    net.train()
    ys = net(torch.randn(2, 3, 64, 64))
    assert [tuple(y.shape) for y in ys] == [(2, 64, 16, 16), (2, 128, 8, 8)]
    sum(y.square().mean() for y in ys).backward()
    assert isinstance(net.layer1[0].conv1, CONV_LAYERS[kind])
    masked = [m for m in net.modules() if hasattr(m, "mask")]
    assert bool(masked) == ("Sparse" in kind)
    assert all(not m.weight.grad[~m.mask].any() for m in masked)


def test_a_munit_scaled_head_keeps_its_unit_variance() -> None:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    anchors = {"type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 1, "ratios": [1.0]}
    head = MODELS.build(
        {
            "type": "RetinaHead",
            "num_classes": 3,
            "in_channels": 32,
            "feat_channels": 32,
            "stacked_convs": 2,
            "conv_cfg": {"type": "MuSConv2d", "fp8": True},
            "anchor_generator": {**anchors, "strides": [8, 16]},
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder"},
        }
    )
    head.init_weights()  # its init_cfg draws plain convolutions with a standard deviation of 0.01
    scaled = [m for m in head.modules() if isinstance(m, MunitScaled)]
    assert len(scaled) == 4
    assert all(m.fp8 and m.weight.std().item() == pytest.approx(1, abs=0.05) for m in scaled)
    assert head.retina_cls.weight.std() < 0.02
    scores, boxes = head([torch.randn(2, 32, 8, 8), torch.randn(2, 32, 4, 4)])
    assert [tuple(s.shape) for s in scores] == [(2, 3, 8, 8), (2, 3, 4, 4)]
    assert [tuple(b.shape) for b in boxes] == [(2, 4, 8, 8), (2, 4, 4, 4)]
    sum(y.square().mean() for y in (*scores, *boxes)).backward()
    assert all(m.weight.grad.isfinite().all() and m.weight.grad.any() for m in scaled)
