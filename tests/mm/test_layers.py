"""Sparse convolutions by name in MMDetection's models."""

import pytest
import torch

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
mm = pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from revnets.mm.layers import CONV_LAYERS, register_conv_layers  # noqa: E402


def test_registering_again_is_harmless() -> None:
    register_conv_layers()


@pytest.mark.parametrize("kind", CONV_LAYERS)
def test_conv_cfg(kind: str) -> None:
    models = pytest.importorskip("mmdet.models", reason=REASON)
    cfg = {"type": kind, "sparsity": 0.75}
    net = models.ResNet(18, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1), conv_cfg=cfg)
    net.init_weights()
    net.train()
    ys = net(torch.randn(2, 3, 64, 64))
    assert [tuple(y.shape) for y in ys] == [(2, 64, 16, 16), (2, 128, 8, 8)]
    sum(y.square().mean() for y in ys).backward()
    masked = [m for m in net.modules() if hasattr(m, "mask")]
    assert isinstance(net.layer1[0].conv1, CONV_LAYERS[kind])
    assert masked
    assert all(not m.weight.grad[~m.mask].any() for m in masked)
