"""Corners that once were wrong: ops used twice, hooks in ops without their own rewind, parameters replaced."""

import copy

import pytest
import torch
from torch import Tensor, nn

from revnets.models.revbifpn import RevBiFPN
from revnets.reversible import AdditiveCoupling, Parallel, ReversibleError, ReversibleOp, RevSequential
from tests.helpers import assert_same_step, training_step
from tests.reversible.graphs import cubic


class Shear(ReversibleOp):
    """An op that leaves the backward pass to the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, 3)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        a, b = xs
        return a, b + self.branch("f", self.f, a)

    def inverse(self, *ys: Tensor) -> tuple[Tensor, ...]:
        a, b = ys
        return a, b - self.branch("f", self.f, a)


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator)


def coupling() -> AdditiveCoupling:
    torch.manual_seed(0)
    return AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3))


def test_an_op_used_twice_runs_twice() -> None:
    op = coupling()
    net = RevSequential([op, op])
    assert torch.equal(net(*pair())[0], op(*op(*pair()))[0])
    results = [training_step(copy.deepcopy(net), pair(), cubic, mode) for mode in ("reversible", "store")]
    assert_same_step(*results, 1e-5)


def test_a_branch_run_twice_in_one_op_is_refused() -> None:
    op = AdditiveCoupling(nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ReversibleError, match="run twice in one forward"):
        RevSequential([Parallel([op, op])])(torch.ones(1, 4), torch.ones(1, 4))


def test_hooks_fire_once_in_ops_without_their_own_rewind() -> None:
    results = []
    for mode in ("reversible", "store"):
        torch.manual_seed(0)
        net = RevSequential([Shear(), Shear()])
        calls: list[int] = []
        for p in net.parameters():
            p.register_hook(lambda g, calls=calls: (calls.append(1), 2 * g)[1])
        results.append(training_step(net, pair(), cubic, mode))
        assert len(calls) == 4
    assert_same_step(*results, 1e-5)


def test_replaced_and_frozen_parameters_are_noticed() -> None:
    net = RevSequential([coupling()])
    loss = cubic(net(*pair()))
    net.requires_grad_(False)
    with pytest.raises(ReversibleError, match="replaced or frozen between forward and backward"):
        loss.backward()
    net.requires_grad_(True)
    weights = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    loss = cubic(torch.func.functional_call(net, weights, pair()))
    with pytest.raises(ReversibleError, match="functional_call"):
        loss.backward()


def test_data_parallel_is_refused() -> None:
    net = RevSequential([coupling()])
    net._is_replica = True  # as nn.DataParallel marks its replicas
    with pytest.raises(ReversibleError, match="DistributedDataParallel"):
        net(*pair())


def test_only_reversible_ops_are_taken() -> None:
    with pytest.raises(TypeError, match="takes reversible ops, got Linear"):
        RevSequential([nn.Linear(1, 1)])  # type: ignore[list-item]


def test_many_channels_train_under_autocast() -> None:
    model = RevBiFPN(width=1 / 3, extra_silos=0, in_chans=4, stem_stride=4, num_classes=3).train()
    assert model.stem is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 4, 64, 64)).float().square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_exact_inverse_with_ops_in_eval() -> None:
    net = RevSequential([coupling()], exact=True)
    net.ops.eval()
    xs = tuple(torch.round(x * 4096) / 4096 for x in pair())
    assert all(torch.equal(a, b) for a, b in zip(net.inverse(*net(*xs)), xs, strict=True))


@pytest.mark.parametrize("exact", [12.5, "yes", None])
def test_exact_must_be_a_switch_or_a_whole_number(exact: object) -> None:
    with pytest.raises(ValueError, match="expected True, False, or the grid"):
        RevSequential([coupling()], exact=exact)  # type: ignore[arg-type]
