"""`torch.fx` of ops that look at shapes: one node each, in evaluation and in training."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from revnets.reversible import KeptUpdate, Leapfrog, ReversibleOp, RevSequential


class Chained(nn.Module):
    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = sum(self.chain(x))
        return total


def _leapfrogs() -> list[ReversibleOp]:
    return [Leapfrog(nn.Linear(4, 4), start=True), Leapfrog(nn.Linear(4, 4)), Leapfrog(nn.Linear(4, 4), end=True)]


def _updates() -> list[ReversibleOp]:
    return [KeptUpdate(nn.Linear(4, 4)), KeptUpdate(nn.Linear(4, 4))]


def gradients(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    net.zero_grad()
    net(x).square().mean().backward()
    return [p.grad for p in net.parameters()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ops", [_leapfrogs, _updates])
def test_a_chain_is_traced(ops: Callable[[], list[ReversibleOp]], training: bool) -> None:
    torch.manual_seed(0)
    net, x = Chained(RevSequential(ops(), exact=True)).train(training), torch.randn(3, 4)
    expected = gradients(copy.deepcopy(net), x)
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == (["chain"] if training else [f"chain.ops.{k}" for k in range(len(ops()))])
    assert len(expected) == 2 * len(ops())
    for got, grad in zip(gradients(traced, x), expected, strict=True):
        assert got is not None
        assert grad is not None
        assert torch.equal(got, grad)
