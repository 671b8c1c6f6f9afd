"""`output_stride`: coarse scales at a finer stride, their convolutions dilated, as timm's users know it."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from revnets.layers import MBConv
from revnets.reversible import RevSilo
from tests.helpers import assert_same_step, training_step
from tests.models.registry import TINY, TINY_TRANSFORMERS, images, make, meta_model, with_statistics


@pytest.mark.parametrize("output_stride", [16, pytest.param(8, marks=pytest.mark.slow)])
def test_maps_and_features_have_the_stride_asked_for(output_stride: int) -> None:
    published = meta_model("revbifpn_s0").state_dict()
    model = timm.create_model("revbifpn_s0", output_stride=output_stride, device="meta").eval()
    assert {key: x.shape for key, x in model.state_dict().items()} == {key: x.shape for key, x in published.items()}
    strides = [min(4 * 2**k, output_stride) for k in range(4)]
    x = torch.empty(1, 3, 2 * output_stride, 64, device="meta")
    features, maps = model.forward_intermediates(x)
    assert features.shape[2:] == (2, 64 // output_stride)
    assert [y.shape[2:] for y in maps] == [(2 * output_stride // s, 64 // s) for s in strides]
    assert [info["reduction"] for info in model.feature_info] == strides
    with pytest.raises(ValueError, match=f"must be divisible by {output_stride}"):
        model(x[..., :60])


def without_mixing(model: Any) -> Any:
    """No squeeze-and-excite, whose mean is over other pixels, and nothing from coarse to fine, which interpolates."""
    for module in model.modules():
        if isinstance(module, MBConv):
            module.se = None
        if isinstance(module, RevSilo):
            for branch in module.up.values():
                last: Any = [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)][-1]
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
    return model


@pytest.mark.parametrize(("stem_stride", "output_stride"), [(4, 16), (2, 8)])
def test_dilated_convolutions_see_what_strided_ones_see(stem_stride: int, output_stride: int) -> None:
    plain, dilated = (
        without_mixing(with_statistics(make(TINY, stem_stride=stem_stride, output_stride=stride).double()))
        for stride in (32, output_stride)
    )
    dilated.load_state_dict(plain.state_dict())
    x = images(1, 64).double()
    with torch.no_grad():
        pairs = [*zip(dilated.forward_pyramid(x), plain.forward_pyramid(x), strict=True)]
        pairs.append((dilated.forward_features(x), plain.forward_features(x)))
    for got, expected in pairs:
        step = got.shape[-1] // expected.shape[-1]
        torch.testing.assert_close(got[..., ::step, ::step], expected)
    assert pairs[3][0].shape[-1] == 64 // output_stride


def test_reversible_gradients_are_those_of_store() -> None:
    steps = [
        training_step(make(TINY, output_stride=8, num_classes=3), (images(),), lambda y: y.square().mean(), mode)
        for mode in ("reversible", "store")
    ]
    assert_same_step(*steps, 0)


def test_what_no_network_has_is_refused() -> None:
    with pytest.raises(ValueError, match="output_stride=4: expected 32"):
        make(TINY, output_stride=4)
    for name in TINY_TRANSFORMERS:
        with pytest.raises(ValueError, match=r"output_stride=8: all maps of test_.*: pass patch_size=8"):
            make(name, output_stride=8)
        assert make(name, output_stride=16).patch_embed.proj.stride == (16, 16)
        assert make(name, patch_size=8, output_stride=8).patch_embed.proj.stride == (8, 8)
