"""check_reversibility: zero in exact mode, the true error without, the op named where it grows, nothing disturbed."""

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets
from revnets.reversible import AdditiveCoupling, ReversibleOp, RevSequential
from revnets.reversible.check import OpError, ReversibilityReport
from tests.reversible.graphs import BRANCHES, build


@pytest.mark.parametrize("kind", sorted(BRANCHES))
@pytest.mark.parametrize("amp", [False, True])
def test_exact_mode_loses_nothing(kind: str, amp: bool) -> None:
    net = build([1, 2, 3, 3], [kind], exact=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        report = revnets.check_reversibility(net, torch.rand(2, 3, 16, 16))
    assert report.exact
    assert report.grows_at is None
    assert "exact to the bit" in str(report)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-3), (torch.bfloat16, 30.0)])
def test_any_dtype(dtype: torch.dtype, bound: float) -> None:
    report = revnets.check_reversibility(build([1, 2, 2], ["conv"]).to(dtype), torch.rand(2, 3, 16, 16, dtype=dtype))
    assert 0 < report.max_error < bound
    assert [op.name for op in report.ops] == [f"ops.{n}" for n in range(len(report.ops))]


class Lossy(ReversibleOp):
    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return (xs[0] * 2,)

    def inverse(self, *ys: Tensor) -> tuple[Tensor, ...]:
        return (ys[0] * 0.5 + 0.25,)


def test_the_op_where_it_grows_is_named() -> None:
    blocks = [AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)]
    net = nn.Sequential(nn.Linear(4, 4), RevSequential([*blocks[:2], Lossy(), blocks[2]]), nn.Identity())

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net[1](net[0](x))[0]

    model = Model()
    model.net = net
    report = revnets.check_reversibility(model, torch.rand(3, 4))
    assert report.grows_at is not None
    assert report.grows_at.name == "net.1.ops.2"
    assert report.grows_at.local == pytest.approx(0.25)
    assert "net.1.ops.2 (Lossy)" in str(report)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_numbers_that_are_none_are_never_exact(place: int, odd: float) -> None:
    """Wherever they are: comparisons with NaN are all false, so the order of the ops must not matter."""
    errors = [odd if n == place else 0.0 for n in range(3)]
    ops = tuple(OpError(f"ops.{n}", "Lossy", e, e, e, e or 1.0) for n, e in enumerate(errors))
    report = ReversibilityReport(ops)
    assert not report.exact
    assert math.isnan(report.max_error) if odd != odd else report.max_error == odd
    assert report.grows_at is not None
    assert report.grows_at.name == f"ops.{place}"
    assert "exact" not in str(report)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_reported(odd: float) -> None:
    x = torch.rand(2, 4)
    x[0, 3] = odd  # of the half that the first branch does not read
    net = RevSequential([AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)])
    report = revnets.check_reversibility(net, x)
    assert not report.exact
    assert math.isnan(report.max_error)


def test_nothing_is_disturbed() -> None:
    model = timm.create_model("test_revbifpn", drop_path_rate=0.5).train()
    x = torch.rand(2, 3, 32, 32)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert revnets.check_reversibility(model, x).exact
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_without_reversible_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no RevSequential"):
        revnets.check_reversibility(nn.Linear(2, 2), torch.rand(1, 2))
