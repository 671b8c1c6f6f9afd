"""Layers as matrices: a convolution is the linear layer of its unfolded image."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

from revnets.pruning import densify, keep_zeros, prune
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
    torch.manual_seed(0)  # on rare data plain magnitude is better for one group only: then the whole layer differs
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


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_blocks_run_along_the_channels(method: str) -> None:
    report = prune(nn.Sequential(conv("plain")), torch.randn(4, 8, 7, 6).double(), 0.7, "4x1", method, exclude=())
    weight = report.model[0].weight
    empty = (weight == 0).unflatten(1, (2, 4)).all(2)
    assert int(empty.sum()) == round(0.7 * empty.numel())
    assert int((weight == 0).sum()) == 4 * int(empty.sum())
    assert report.target == "4x1 0.7"


def test_padding_that_depends_on_the_image() -> None:
    same, plain = Conv2dSame(8, 6, 3, stride=2).double(), nn.Conv2d(8, 6, 3, stride=2).double()
    plain.load_state_dict(same.state_dict())
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64)  # padded by 1 and 1, and by 0 and 1
    mine, other = Moments(same), Moments(plain)
    mine.add(x)
    other.add(nn.functional.pad(x, (0, 1, 1, 1)))
    assert torch.equal(mine.hessian(), other.hessian())


def test_layers_of_timm_that_pad_or_standardise_by_themselves() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), Conv2dSame(8, 8, 3, stride=2), StdConv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
    ).eval()
    x = torch.randn(8, 3, 12, 12)
    report = prune(net, x, sparsity=0.5, exclude=("first", "3"))
    assert [(layer.name, layer.zeros) for layer in report.layers] == [("1", 288)]
    reasons = {skipped.name: skipped.reason for skipped in report.skipped}
    assert "zeros would not stay zeros" in reasons["2"]
    masked, network = copy.deepcopy(report.model), report.model
    assert keep_zeros(masked) == ["1"]
    assert torch.equal(masked(x), network(x))
    again = densify(masked)
    assert type(again.get_submodule("1")) is Conv2dSame
    assert torch.equal(again(x), network(x))
    assert prune(masked, x, sparsity=0.6, exclude=("first", "3")).layers[0].zeros == 346
