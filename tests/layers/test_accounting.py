"""FLOPs against closed forms, and traces that leave no trace."""

import pytest
import timm
import torch
from torch import nn

from revnets.layers import SparseConv2d, SparseLinear, count_costs
from revnets.layers.trace import TraceError, trace


def test_closed_forms() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),  # 8 x 8 x 8
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        SparseConv2d(8, 12, 3, groups=2, sparsity=0.75),  # 12 x 6 x 6
        nn.BatchNorm2d(12),
        nn.Flatten(),
        SparseLinear(432, 10, sparsity=0.9),
    )
    layers = {layer.name: layer for layer in count_costs(net, (3, 16, 16)).layers}
    assert layers["0"].flops == layers["0"].sparse_flops == 2 * 27 * 8 * 64
    assert layers["1"].flops == 2 * 25 * 8 * 64
    assert layers["2"].flops == 2 * 9 * 4 * 12 * 36
    assert layers["2"].sparse_flops == 2 * int(net[2].mask.sum()) * 36 == layers["2"].flops // 4
    assert layers["5"].sparse_flops == 2 * int(net[5].mask.sum()) == 2 * 432
    assert layers["5"].parameters == 4330
    assert layers["5"].active_parameters == 432 + 10
    assert layers["3"].parameters == 24
    assert layers["3"].flops == 0


def test_attention_counts() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
    n, d = 197, 192
    patches, classifier = 196 * 3 * 16 * 16 * d, d * 1000
    block = n * d * (3 * d + d + 8 * d) + 2 * n * n * d
    assert count_costs(model, (3, 224, 224)).flops == 2 * (patches + block + classifier)


def test_published_macs() -> None:
    with torch.device("meta"):
        resnet = timm.create_model("resnet18")
    assert count_costs(resnet, (3, 224, 224)).flops == 2 * 1_814_073_344
    assert count_costs(resnet, (3, 224, 224)).parameters == 11_689_512


def test_meta_masks_count_by_sparsity() -> None:
    with torch.device("meta"):
        layer = SparseLinear(40, 10, sparsity=0.75)
    assert count_costs(layer, (40,)).sparse_flops == 200


def test_trace_leaves_the_model_as_it_is() -> None:
    model = timm.create_model("test_resnet").train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    trace(model, (3, 64, 64))
    assert model.training
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(TraceError, match="ResNet does not run on an input of shape"):
        trace(model, (5, 64, 64))
