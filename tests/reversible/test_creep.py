"""Memory does not creep: thousands of steps, failed ones among them, leave nothing behind, without the collector."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.reversible import MODES, RevSequential, set_mode

from .graphs import build

STEPS = [200, pytest.param(2000, marks=pytest.mark.slow)]


class Fails(RuntimeError):
    """In the middle of a forward pass."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def network(mode: str) -> RevSequential:
    net = build([1, 2, 2], ["batch_norm", "dropout"], exact=True)
    set_mode(net, mode)
    return net


def trained(net: RevSequential, x: Tensor, step: int) -> None:
    """One step of a kind that depends on its number: one output unused, failing, evaluation, graph dropped."""
    net.train(step % 5 != 3)
    if step % 5 == 3:
        with torch.no_grad():
            net(x)
    elif step % 5 == 1:
        handle = failing(net)
        try:
            with pytest.raises(Fails):
                net(x)
        finally:
            handle.remove()
    elif step % 5 == 2:
        net(x)  # a graph that nobody goes back through
    else:
        ys = net(x)
        (ys[step % 2].square().mean() if step % 10 else sum(y.square().mean() for y in ys)).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.sub_(1e-3 * parameter.grad)
    net.zero_grad(set_to_none=True)


def failing(net: nn.Module) -> Any:
    def fail(*_: Any) -> None:
        raise Fails

    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    return convs[len(convs) // 2].register_forward_hook(fail)


def tensors() -> int:
    """How many tensors Python holds, reachable or not: the collector is off."""
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("mode", MODES)
def test_bytes_at_the_end_are_those_of_step_ten(mode: str, steps: int, no_collector: None) -> None:
    net, x = network(mode), torch.randn(2, 3, 8, 8)
    for step in range(10):
        trained(net, x, step)
    before = tensors()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        for step in range(10, steps):
            trained(net, x, step)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert len(changes) > steps
    assert sum(changes) == 0
    assert tensors() == before


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_backward_leaves_nothing(mode: str, no_collector: None) -> None:
    net, x = network(mode), torch.randn(2, 3, 8, 8)

    def step() -> None:
        ys = net(x)
        ys[0].register_hook(fail)
        with pytest.raises(Fails):
            sum(y.square().mean() for y in ys).backward()  # type: ignore[union-attr]
        net.zero_grad(set_to_none=True)

    def fail(grad: Tensor) -> None:
        raise Fails

    step()
    before = tensors()
    for _ in range(20):
        step()
    assert tensors() == before
