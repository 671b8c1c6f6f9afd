"""`torch.fx` of a network that was made reversible: itself in evaluation, its stages as nodes in training."""

import copy

import pytest
import timm
import torch
import torch.fx
from torch import Tensor, nn

import revnets


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    net.zero_grad()
    net(x).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
def test_a_retrofitted_network_is_traced(training: bool) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=3)
    revnets.reversible(net)  # type: ignore[operator]
    x = torch.randn(2, 3, 64, 64)
    other = copy.deepcopy(net).train(training)
    traced = torch.fx.symbolic_trace(net.train(training))
    expected, got = gradients(other, x), gradients(traced, x)
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        value = got[name]
        assert grad is not None, name
        assert value is not None, name
        assert torch.equal(value, grad), name
    stages = [node.target for node in traced.graph.nodes if node.op == "call_module" and node.target == "layer1"]
    assert len(stages) == training
