"""The state of an optimizer fits, or is refused: of the optimizers that timm's ``--opt`` offers."""

import copy

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from revnets.training.checkpoints.fitting import check_optimizer
from revnets.training.checkpoints.tree import Mismatch


def stepped(name: str, steps: int) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.01)
    for _ in range(steps):
        model(torch.randn(2, 3, 3, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


NAMES = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adafactorbv",
    "adagrad",
    "adamp",
    "adamw",
    "adan",
    "adopt",
    "cadamw",
    "lamb",
    "laprop",
    "lars",
    "lion",
    "lookahead_adam",
    "madgrad",
    "mars",
    "muon",
    "nadam",
    "nadamw",
    "novograd",
    "radam",
    "rmsprop",
    "rmsproptf",
    "sgd",
    "sgdw",
]


@pytest.mark.parametrize("name", NAMES)
def test_own_states_fit(name: str) -> None:
    fresh = stepped(name, 0)
    before = copy.deepcopy(fresh.state_dict())
    for steps in (0, 1, 3):
        check_optimizer(fresh, stepped(name, steps).state_dict())
    assert str(fresh.state_dict()) == str(before)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "adafactor", "lion", "rmsprop", "nadamw", "muon"])
def test_states_of_other_shapes_do_not(name: str) -> None:
    fresh, state = stepped(name, 0), stepped(name, 2).state_dict()
    for number, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.dim():
                odd = {**entry, key: torch.ones(*value.shape, 2)}
                with pytest.raises(Mismatch, match=rf"^optimizer.state\[{number}\].{key} is a tensor of shape"):
                    check_optimizer(fresh, {**state, "state": {**state["state"], number: odd}})


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lookahead_adam"])
def test_switches_of_a_state_do_not_replace_those_of_the_run(name: str) -> None:
    fresh = stepped(name, 0)
    own = fresh.param_groups[0]
    switches = [key for key, value in own.items() if isinstance(value, bool)]
    assert "maximize" in switches
    for key in switches:
        state = stepped(name, 1).state_dict()
        state["param_groups"][0][key] = not own[key]
        with pytest.raises(Mismatch, match=rf"param_groups\[0\]\.{key} is {not own[key]}, {own[key]}, as in this run"):
            check_optimizer(fresh, state)


@pytest.mark.parametrize(("value", "fits"), [(None, True), (True, True), (False, True), (1.5, False), ("yes", False)])
def test_states_of_other_kernels_fit(value: object, fits: bool) -> None:
    fresh, state = stepped("adamw", 0), stepped("adamw", 1).state_dict()
    for group in state["param_groups"]:
        group["foreach"] = group["fused"] = value
    if fits:
        check_optimizer(fresh, state)
    else:
        with pytest.raises(Mismatch, match=r"param_groups\[0\]\.f"):
            check_optimizer(fresh, state)
