"""Updates that are not finite are left out, and the layer where it began is named."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.training.guards.finite import FiniteGuard, SkippedByScaler, diagnose


class Breaks(nn.Module):
    """The identity, until told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        return x / 0 if self.broken else x


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Breaks(), nn.Linear(4, 2))


def step(net: nn.Module, guard: FiniteGuard, x: Tensor, scale: float = 1.0) -> bool:
    net.zero_grad()
    loss = net(x).square().mean() * scale
    guard.note(loss)
    loss.backward()
    return guard.good()


def test_statistics_are_those_of_the_last_good_update(net: nn.Sequential) -> None:
    guard, x = FiniteGuard(net, limit=2), torch.randn(8, 4)
    guard.start()
    assert step(net, guard, x)
    before = {name: b.clone() for name, b in net.named_buffers() if b.is_floating_point()}
    bad = x.clone()
    bad[0, 0] = float("nan")
    assert not step(net, guard, bad)
    assert all(torch.equal(dict(net.named_buffers())[name], value) for name, value in before.items())
    assert (guard.skipped, guard.in_a_row, guard.exhausted) == (1, 1, False)
    assert step(net, guard, x)
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    assert not step(net, guard, bad)
    assert not step(net, guard, bad)
    assert guard.exhausted


def test_counters_go_on_after_a_resume(net: nn.Sequential) -> None:
    guard, x = FiniteGuard(net, limit=2), torch.full((8, 4), float("nan"))
    assert not step(net, guard, x)
    resumed = FiniteGuard(net, limit=2)
    resumed.load_state_dict(guard.state_dict())
    assert not step(net, resumed, x)
    assert (resumed.skipped, resumed.exhausted) == (2, True)
    resumed.load_state_dict({})  # of an older checkpoint
    assert (resumed.skipped, resumed.in_a_row) == (0, 0)


def test_gradients_alone_count(net: nn.Sequential) -> None:
    guard = FiniteGuard(net)
    net(torch.randn(8, 4)).sum().backward()
    next(iter(net.parameters())).grad[0, 0] = float("inf")  # type: ignore[index]
    assert not guard.good()


@pytest.mark.parametrize("value", [1.0, float("inf")])
def test_what_a_loss_scaler_leaves_out_is_seen(net: nn.Sequential, value: float) -> None:
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    for _ in range(2):
        scaler.scale(net(torch.randn(8, 4)).sum()).backward()
        next(iter(net.parameters())).grad[0, 0] = value  # type: ignore[index]
        with SkippedByScaler(scaler) as update:
            scaler.step(optimizer)
            scaler.update()
        assert update.skipped == (value != 1)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_what_a_loss_scaler_leaves_out_counts_up_to_the_limit(net: nn.Sequential, limit: int) -> None:
    """As an update that the guard leaves out itself: statistics go back, the losses so far are of no update."""
    guard, x = FiniteGuard(net, limit=limit), torch.randn(8, 4)
    guard.start()
    assert step(net, guard, x)
    before = {name: b.clone() for name, b in net.named_buffers() if b.is_floating_point()}
    for count in range(1, 4):
        guard.note(net(x).sum() * float("nan"))
        assert not guard.good(gradients=False, skipped=True)
        assert (guard.skipped, guard.in_a_row) == (count, count)
        assert guard.exhausted == (0 < limit <= count)
        if limit:
            assert all(torch.equal(dict(net.named_buffers())[name], value) for name, value in before.items())
    guard.note(net(x).sum())
    assert guard.good(gradients=False)  # the NaN before are forgotten
    assert guard.in_a_row == (0 if limit else 3)
    assert not guard.exhausted


def test_every_loss_of_an_update_counts(net: nn.Sequential) -> None:
    for bad in range(3):
        guard = FiniteGuard(net)
        for number in range(3):
            guard.note(torch.tensor(float("inf") if number == bad else 1.0))
        assert not guard.good(gradients=False)
        guard.note(torch.tensor(1.0))
        assert guard.good(gradients=False)


def test_a_scale_that_grows_is_no_skipped_update(net: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)
    scales = []
    for _ in range(3):
        scaler.scale(net(torch.randn(8, 4)).sum()).backward()
        with SkippedByScaler(scaler) as update:
            scaler.step(optimizer)
            scaler.update()
        assert not update.skipped
        scales.append(scaler.get_scale())
    assert scales == [4.0, 8.0, 16.0]


def test_failures_that_others_report_forget_the_losses(net: nn.Sequential) -> None:
    guard = FiniteGuard(net)
    guard.note(torch.tensor(float("nan")))
    guard.failed("elsewhere")
    guard.note(torch.tensor(1.0))
    assert guard.good(gradients=False)


def test_zero_never_looks(net: nn.Sequential) -> None:
    guard = FiniteGuard(net, limit=0)
    guard.start()
    assert step(net, guard, torch.full((8, 4), float("nan")))
    assert not guard.exhausted


def test_the_first_layer_is_named(net: nn.Sequential) -> None:
    x = torch.randn(8, 4)

    def forward() -> Any:
        return net(x).sum()

    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert "finite loss again" in diagnose(net, forward)
    net[2].broken = True
    assert "output that is not finite is that of layer '2' (Breaks), from inputs up to" in diagnose(net, forward)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    net[2].broken = False
    x[0] = float("inf")
    assert diagnose(net, forward) == "the input of layer '0' (Linear), the first, is not finite"
    with torch.no_grad():
        net[3].bias.fill_(float("nan"))
    assert diagnose(net, forward) == "weight '3.bias' and 0 others are not finite"


def test_exact_modes_guard_names_the_op() -> None:
    from revnets.reversible import AdditiveCoupling, RevSequential

    net = RevSequential([AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))], exact=True)
    with torch.no_grad():
        next(net.parameters()).fill_(1e6)
    assert "beyond the range" in diagnose(nn.Sequential(net), lambda: net(torch.ones(1, 4)).sum())
