"""Compiled branches: the values of eager ones, statistics once per step, and exact mode still exact."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets
from revnets.reversible import AdditiveCoupling, RevSequential, RevSilo, compile_branches
from revnets.reversible.call import is_compiled
from revnets.reversible.compiled import branches


def branch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Hardswish())


def network() -> RevSequential:
    torch.manual_seed(0)
    silo = RevSilo(
        {(0, 1): nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 1))}, {(1, 0): nn.Upsample(scale_factor=2)}, 1
    )
    return RevSequential([AdditiveCoupling(branch(), branch()), silo], exact=True)


def step(net: nn.Module, mode: str) -> dict[str, Tensor]:
    net = revnets.set_mode(copy.deepcopy(net), mode)
    torch.manual_seed(1)
    x = torch.randn(2, 8, 8, 8)
    ys = net(x)
    loss = sum(y.square().mean() for y in (ys if isinstance(ys, tuple) else (ys,)))
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in net.named_parameters()}, **dict(net.named_buffers())}


def test_all_branches_and_nothing_else() -> None:
    net = network()
    assert {id(b) for b in branches(net)} == {
        id(m) for m in (net.ops[0].f, net.ops[0].g, net.ops[1].down["0_1"], net.ops[1].up["1_0"])
    }
    compile_branches(net, backend="eager")
    assert all(is_compiled(b) for b in branches(net))
    with pytest.raises(ValueError, match="Linear has no reversible op"):
        compile_branches(nn.Linear(1, 1))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_same_step_in_all_modes(backend: str) -> None:
    eager, compiled = network(), compile_branches(network(), backend=backend)
    stored, found = step(compiled, "store"), step(compiled, "reversible")
    for name, expected in step(eager, "store").items():
        assert torch.equal(stored[name], found[name]), name
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4, msg=name)  # a step of the grid is 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True])
def test_revbifpn(amp: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_revbifpn", drop_rate=0.0, drop_path_rate=0.2).train()
    model.compile_branches()
    x, state, found = torch.randn(4, 3, 64, 64), copy.deepcopy(model.state_dict()), {}
    for mode in ("store", "reversible"):
        model.load_state_dict(state)
        model.set_mode(mode)
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(x).float().square().mean()
        loss.backward()
        found[mode] = [loss.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
