"""Masks gone and masks found: sparse networks as dense ones, and zeros that stay in training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import revnets
from revnets.layers import SparseConv2d, SparseLinear
from revnets.pruning import keep_zeros
from revnets.sparsity import SparsityController, sparse_layers


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_densified_network_is_the_plain_one(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = revnets.convert(timm.create_model(name, num_classes=3), "sparse:0.75").model.train()
    weights = copy.deepcopy(model.state_dict())
    dense = revnets.densify(model)
    assert dense.training
    assert sparse_layers(model)
    assert not sparse_layers(dense)
    plain = timm.create_model(name, num_classes=3)
    plain.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model.eval()(x))
    state = revnets.densify(weights)
    assert all(torch.equal(state[key], value) for key, value in dense.state_dict().items())
    torch.save({"state_dict": {"other": torch.ones(1)}, "state_dict_ema": weights}, tmp_path / "last.pth.tar")
    assert set(revnets.densify(tmp_path / "last.pth.tar")) == set(state)
    assert sum(p.requires_grad for p in dense.parameters()) == sum(p.requires_grad for p in model.parameters())


def test_all_weights_of_a_densified_layer_train() -> None:
    dense = revnets.densify(nn.Sequential(SparseLinear(8, 8, sparsity=0.75)))
    dense(torch.randn(4, 8)).sum().backward()
    assert (dense[0].weight.grad != 0).all()


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.bias", "2.weight"], ["0.weight", "0.bias", "2.weight", "2.bias"]])
def test_what_is_frozen_stays_frozen(frozen: list[str]) -> None:
    model = nn.Sequential(SparseLinear(8, 8, sparsity=0.75), nn.ReLU(), SparseConv2d(8, 4, 1, sparsity=0.5)).train()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    dense = revnets.densify(model)
    assert [name for name, p in dense.named_parameters() if not p.requires_grad] == frozen
    assert all(module.training for module in dense.modules())


def test_only_masks_are_dropped() -> None:
    state = {"a.weight": torch.ones(2), "a.mask": torch.tensor([True, False]), "b.mask": torch.ones(2)}
    dense = revnets.densify(state)
    assert list(dense) == ["a.weight", "b.mask"]
    assert dense["a.weight"].tolist() == [1, 0]


@pytest.mark.parametrize("content", [b"no checkpoint", b""])
def test_damaged_checkpoints_are_a_sentence(tmp_path: Path, content: bytes) -> None:
    for name in ("a.pth.tar", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="give another one"):
            revnets.densify(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file"):
        revnets.densify(tmp_path / "missing")


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(128, 4)
    )
    for layer in (model[2], model[4]):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.3
    return model


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_zeros_stay_through_training(momentum: float) -> None:
    model, plain = pruned(), pruned()
    zeros = {name: p == 0 for name, p in model.named_parameters()}
    parameters, x = dict(model.named_parameters()), torch.randn(4, 3, 8, 8)
    names = list(model.state_dict())
    assert keep_zeros(model) == ["2", "4"]
    assert isinstance(model[2], SparseConv2d)
    assert list(model.state_dict()) == names
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(model(x), plain(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=1e-2)
    controller = SparsityController(model, optimizer, "static")
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        controller.step()
    for name, p in model.named_parameters():
        assert torch.equal(p == 0, zeros[name]), name
        assert not torch.equal(p, before[name])
    plain.load_state_dict(model.state_dict())
    other = pruned()
    keep_zeros(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), other(x))


def test_nothing_to_keep() -> None:
    dense = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    dense[1].weight.data.zero_()  # as initialised, not pruned
    with pytest.raises(ValueError, match="no layer holds zeros"):
        keep_zeros(dense)
    dense[0].weight.data[0] = 0
    dense[1].weight = dense[0].weight
    with pytest.raises(ValueError, match="0 and 1 share one weight"):
        keep_zeros(dense)
    assert type(dense[0]) is nn.Linear
