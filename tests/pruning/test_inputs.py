"""Layers as matrices: a convolution is the linear layer of its unfolded image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.pruning import prune
from revnets.pruning.inputs import Moments, as_matrices, like_weight, shape

CONVS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": 2, "padding": 2},
    "same": {"padding": "same", "kernel_size": (3, 2)},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 8, "padding": 1, "out_channels": 16},
    "pointwise": {"kernel_size": 1},
}


def conv(name: str) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 8, "out_channels": 6, "kernel_size": 3, **CONVS[name]}).double()


def rows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What each group reads, ``(G, n, D)``, as the layer shows it: with one weight at 1 the output is an input."""
    found = []
    each = layer.out_channels // layer.groups
    for j in range(layer.weight[0].numel()):
        probe = torch.zeros_like(layer.weight)
        probe.view(layer.out_channels, -1)[::each, j] = 1
        found.append(layer._conv_forward(x, probe, None)[:, ::each].transpose(0, 1).flatten(1))
    return torch.stack(found, -1)


@pytest.mark.parametrize("name", CONVS)
def test_hessian_is_that_of_the_unfolded_image(name: str) -> None:
    layer, x = conv(name), torch.randn(3, 8, 7, 6, dtype=torch.float64)
    moments = Moments(layer)
    for batch in x.split(2):
        moments.add(batch)
    read = rows(layer, x)
    assert moments.rows == read.shape[1]
    torch.testing.assert_close(moments.hessian(), 2 / read.shape[1] * read.mT @ read)
    assert shape(layer) == (read.shape[0], read.shape[2])


@pytest.mark.parametrize("kernel_first", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_weights_go_there_and_back(name: str, kernel_first: bool) -> None:
    layer = conv(name)
    matrices = as_matrices(layer, kernel_first)
    assert torch.equal(like_weight(matrices, layer, kernel_first), layer.weight)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    moments = Moments(layer, kernel_first)
    moments.add(x)
    with torch.no_grad():
        energy = layer._conv_forward(x, layer.weight, None).square().sum()
    torch.testing.assert_close((matrices @ moments.hessian() * matrices).sum() * moments.rows / 2, energy)


@pytest.mark.parametrize("name", ["plain", "strided", "dilated", "pointwise"])
def test_pruned_conv_is_the_pruned_linear_layer(name: str) -> None:
    layer, x = conv(name), torch.randn(6, 8, 7, 6, dtype=torch.float64)
    read = rows(layer, x)[0]
    linear = nn.Linear(read.shape[1], layer.out_channels).double()
    linear.weight.data.copy_(layer.weight.flatten(1))
    options: dict[str, Any] = {"sparsity": 0.6, "exclude": (), "recalibrate": False, "block_size": 16}
    one = prune(nn.Sequential(layer), x, **options)
    two = prune(nn.Sequential(linear), read, images=len(read), **options)
    torch.testing.assert_close(one.model[0].weight.flatten(1), two.model[0].weight)
    assert one.layers[0].error == pytest.approx(two.layers[0].error)


@pytest.mark.parametrize("name", ["grouped", "depthwise"])
def test_groups_are_layers_of_their_own(name: str) -> None:
    layer, x = conv(name), torch.randn(6, 8, 7, 6, dtype=torch.float64)
    report = prune(nn.Sequential(layer), x, sparsity=0.5, exclude=(), block_size=1000)
    assert report.layers[0].zeros == layer.weight.numel() // 2
    with torch.no_grad():
        off = (layer(x) - report.model(x)).square().sum() / layer._conv_forward(x, layer.weight, None).square().sum()
    assert report.layers[0].error == pytest.approx(float(off))
    if name == "grouped":
        mine = prune(nn.Sequential(layer), x, pattern="2:4", exclude=()).model[0].weight
        for g in range(2):
            part = nn.Conv2d(4, 3, 3, padding=1).double()
            part.weight.data.copy_(layer.weight[3 * g : 3 * g + 3])
            alone = prune(nn.Sequential(part), x[:, 4 * g : 4 * g + 4], pattern="2:4", exclude=()).model[0].weight
            torch.testing.assert_close(mine[3 * g : 3 * g + 3], alone)


def test_pattern_runs_along_the_channels() -> None:
    layer = conv("plain")
    weight = prune(nn.Sequential(layer), torch.randn(4, 8, 7, 6).double(), pattern="2:4", exclude=()).model[0].weight
    assert ((weight == 0).unflatten(1, (2, 4)).sum(2) == 2).all()
