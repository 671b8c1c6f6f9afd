"""The state of an optimizer fits, or is refused: of the optimizers that timm's ``--opt`` offers."""

import copy

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from revnets.training.checkpoints.fitting import check_optimizer, complete, differences
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


@pytest.mark.parametrize("name", NAMES)
def test_a_state_lacks_the_entries_only_that_it_says(name: str) -> None:
    """Of every optimizer, as far as it has a state: what is lost is refused, what there never was is not."""
    fresh = stepped(name, 0)
    for steps in (0, 1):
        state = complete(stepped(name, steps).state_dict())
        check_optimizer(fresh, state)
        for number in state["state"]:
            rest = {key: entry for key, entry in state["state"].items() if key != number}
            with pytest.raises(Mismatch, match=rf"^optimizer.state\[{number}\] is missing"):
                check_optimizer(fresh, {**state, "state": rest})
            check_optimizer(fresh, complete({**state, "state": rest}))
            with pytest.raises(Mismatch, match=rf"^optimizer.state\[{number}\] is there"):
                check_optimizer(fresh, {**state, "without_state": [number]})
        fresh.load_state_dict(state)
    with pytest.raises(Mismatch, match="without_state"):
        check_optimizer(fresh, {**state, "without_state": "none"})


def test_parameters_without_a_gradient_have_no_state() -> None:
    used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    runs = [torch.optim.AdamW([unused, used]) for _ in range(2)]
    used.square().sum().backward()
    runs[0].step()
    state = complete(runs[0].state_dict())
    assert state["without_state"] == [0]
    check_optimizer(runs[1], state)
    with pytest.raises(Mismatch, match=r"state\[1\] is missing"):
        check_optimizer(runs[1], {**state, "state": {}})


def test_settings_that_a_state_would_replace() -> None:
    layer = nn.Linear(2, 1)
    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}
    own = torch.optim.AdamW(layer.parameters(), **options)
    assert differences(own, own.state_dict(), ("lr",)) == {}
    other = torch.optim.AdamW(layer.parameters(), **{**options, "betas": (0.8, 0.95), "eps": 1e-6, "lr": 0.2})
    found = {"betas": ([0.8, 0.95], [0.9, 0.95]), "eps": (1e-6, 1e-8)}
    assert differences(own, other.state_dict()) == found
    assert differences(own, other.state_dict(), ("lr",)) == {**found, "lr": (0.2, 0.1)}


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
