"""Drift of rebuilt activations is seen while training, and said once."""

import math

import pytest
import torch
from torch import nn

from revnets.reversible import AdditiveCoupling, RevSequential, set_mode
from revnets.reversible.check import OpError, ReversibilityReport
from revnets.training.guards import drift
from revnets.training.guards.drift import DriftMonitor, part


def chain(exact: bool) -> nn.Module:
    """Twenty couplings."""
    torch.manual_seed(0)
    branches = [[nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2)] for _ in range(20)]
    return RevSequential([AdditiveCoupling(*pair) for pair in branches], exact=exact)


def test_a_bfloat16_stream_is_warned_of_once() -> None:
    net, x = chain(exact=False).bfloat16(), torch.randn(4, 16).bfloat16()
    monitor = DriftMonitor(net, every=10)
    state = torch.get_rng_state()
    warning = monitor.check(x)
    assert "exact=True" in warning
    assert "keep the stream in float32" in warning
    assert monitor.check(x) == ""
    assert monitor.worst > 1e-2
    assert torch.equal(state, torch.get_rng_state())


def test_exact_mode_has_none() -> None:
    monitor = DriftMonitor(chain(exact=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert monitor.check(torch.randn(4, 16)) == ""
    assert monitor.worst == 0


def test_numbers_that_went_wrong_before_are_no_drift() -> None:
    for value in (float("nan"), 1e9):
        for exact in (True, False):
            assert DriftMonitor(chain(exact)).check(torch.full((1, 16), value)) == ""


@pytest.mark.parametrize("place", range(3))
def test_nan_anywhere_is_the_worst(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Whatever comes before and after it: NaN compares with nothing."""
    errors = [math.nan if n == place else 1e-9 for n in range(3)]
    ops = tuple(OpError(f"ops.{n}", "AdditiveCoupling", e, e, e, 1.0) for n, e in enumerate(errors))
    monkeypatch.setattr(drift, "check_reversibility", lambda *_: ReversibilityReport(ops))
    monitor = DriftMonitor(chain(exact=False))
    assert f"off by nan of the largest at ops.{place}" in monitor.check(torch.zeros(1, 16))
    assert math.isnan(monitor.worst)
    assert monitor.check(torch.zeros(1, 16)) == ""  # said once


@pytest.mark.parametrize("place", range(3))
def test_the_worst_op_is_named_again_only_when_it_is_much_worse(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monitor, said = DriftMonitor(chain(exact=False), limit=1e-2), []
    for worst in (1e-3, 1e-2, 2e-2, 1e-1, 0.2, 0.3, 5.0):
        errors = [worst if n == place else 1e-9 for n in range(3)]
        ops = tuple(OpError(f"ops.{n}", "AdditiveCoupling", e, e, e, 1.0) for n, e in enumerate(errors))
        monkeypatch.setattr(drift, "check_reversibility", lambda *_, ops=ops: ReversibilityReport(ops))
        if monitor.check(torch.zeros(1, 16)):
            said.append(worst)
        assert monitor.worst == worst
    assert said == [2e-2, 0.3, 5.0]


def test_batch_norms_of_one_pixel_are_looked_at() -> None:
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)]
    monitor = DriftMonitor(RevSequential([AdditiveCoupling(*branches)], exact=True))
    assert monitor.check(torch.randn(3, 8, 1, 1)) == ""


def test_when_it_looks() -> None:
    net = chain(exact=False)
    assert [DriftMonitor(net, every=3).due(step) for step in range(4)] == [True, False, False, True]
    assert not DriftMonitor(net, every=0).due(0)
    set_mode(net, "store")
    assert not DriftMonitor(net, every=3).due(0)


def test_part_of_an_image() -> None:
    assert part(torch.zeros(2, 3, 800, 1333)).shape == (1, 3, 256, 256)
    assert part(torch.zeros(2, 3, 64, 300)).shape == (1, 3, 64, 256)
