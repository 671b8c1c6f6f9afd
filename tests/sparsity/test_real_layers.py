"""The controller on the library's own layers: convolutions, reversible networks in every mode, torch.compile."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets
from revnets.layers import convert
from revnets.sparsity import SparsityController, sparse_layers

SCHEDULES = ("rigl", pytest.param("set", marks=pytest.mark.slow))


def train(
    model: nn.Module, schedule: str, steps: int = 2, wrapped: nn.Module | None = None, amp: bool = False
) -> dict[str, Tensor]:
    """A few steps; masks, weights and statistics after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    controller = SparsityController(model, optimizer, schedule, total_steps=4, interval=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 32, 32, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = nn.functional.cross_entropy((wrapped or model)(x), torch.arange(4))
        loss.backward()
        optimizer.step()
        controller.step()
        for layer in controller.layers:
            state = optimizer.state[layer.weight]["momentum_buffer"]
            assert not any(t[~layer.mask].any() for t in (layer.weight, layer.weight.grad, state) if t is not None)
            for module in layer.modules:
                assert int(layer.mask.sum()) == round((1 - module.sparsity) * layer.mask.numel())  # type: ignore
    assert len(controller.history) == 2
    assert sum(sum(update.changed) for update in controller.history) > 0
    return model.state_dict()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_modes_of_a_reversible_network_agree_to_the_bit(schedule: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_revbifpn", num_classes=4, layers="sparse_parallel:0.75").train()
    modes = ("store", "checkpoint", "reversible")
    found = [train(revnets.set_mode(copy.deepcopy(model), mode), schedule) for mode in modes]
    for other in found[1:]:
        assert not [name for name in found[0] if not torch.equal(found[0][name], other[name])]


@pytest.mark.parametrize("amp", [False, True])
def test_compiled_network_has_the_masks_of_the_plain_one(amp: bool) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU())
        net = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        model = convert(net, "sparse_parallel:0.5", input_size=(3, 32, 32)).model
        wrapped = torch.compile(model, backend="aot_eager") if compiled else None
        found.append(train(model, "rigl", wrapped=wrapped, amp=amp))  # type: ignore[arg-type]
    masks = [name for name in found[0] if name.endswith("mask")]
    assert masks
    assert all(torch.equal(found[0][name], found[1][name]) for name in masks)


def test_compiled_branches() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_revbifpn", num_classes=4, layers="sparse_parallel:0.75")
    names = [layer.name for layer in sparse_layers(model)]
    revnets.compile_branches(model, backend="eager")
    assert [layer.name for layer in sparse_layers(model)] == names
