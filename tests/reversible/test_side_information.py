"""Ops that are undone with the help of a few bits: what they keep, how little it is, and that it is enough."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.reversible import (
    MODES,
    KeptUpdate,
    Leapfrog,
    Lent,
    ReversibleError,
    RevSequential,
    check_reversibility,
    compile_branches,
)
from revnets.reversible.side import pack, unpack
from tests.helpers import assert_same_step, training_step


class Residual(nn.Module):
    """As in a ResNet: an activation after the sum, statistics and dropout in the branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Dropout(0.1), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


def leapfrogs(blocks: list[Any], bits: int) -> list[Any]:
    last = len(blocks) - 1
    return [Leapfrog(block, bits, start=i == 0, end=i == last) for i, block in enumerate(blocks)]


def updates(blocks: list[Any], bits: int) -> list[Any]:
    return [KeptUpdate(block, bits) for block in blocks]


Make = Callable[[list[Any], int], list[Any]]
KINDS = [(leapfrogs, bits) for bits in (0, 1, 2, 4, 8)] + [(updates, bits) for bits in (4, 8, 16)]
every_kind = pytest.mark.parametrize(("make", "bits"), KINDS, ids=lambda v: getattr(v, "__name__", v))


def chain(make: Make, bits: int, depth: int = 4, exact: bool | int = True) -> RevSequential:
    torch.manual_seed(0)
    return RevSequential(make([Residual(6) for _ in range(depth)], bits), exact=exact)


def loss(ys: tuple[Tensor, ...]) -> Tensor:
    return (ys[0] * torch.linspace(-1, 1, ys[0][0].numel()).view_as(ys[0][0])).sum()


@every_kind
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_all_modes_are_the_same_to_the_bit(make: Make, bits: int, channels_last: bool, autocast: bool) -> None:
    net, x = chain(make, bits), torch.randn(3, 6, 5, 7)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    steps = {m: training_step(copy.deepcopy(net), (x,), loss, mode=m, autocast=autocast) for m in MODES}
    assert_same_step(steps["reversible"], steps["store"], 0)
    assert_same_step(steps["checkpoint"], steps["store"], 0)


@every_kind
@pytest.mark.parametrize("depth", [1, 2, 16])
def test_the_inverse_is_exact_at_any_depth(make: Make, bits: int, depth: int) -> None:
    report = check_reversibility(chain(make, bits, depth), torch.randn(3, 6, 5, 7))
    assert len(report.ops) == depth
    assert report.exact, str(report)


@pytest.mark.parametrize("bits", [1, 4])
def test_without_the_grid_two_streams_lose_their_bits_in_every_op(bits: int) -> None:
    x = torch.randn(3, 6, 5, 7)
    shallow, deep = (check_reversibility(chain(leapfrogs, bits, depth, False), x).max_error for depth in (3, 8))
    assert deep > shallow * 2.0 ** (bits * 4) > 0


def test_without_the_grid_kept_updates_are_off_by_the_rounding_of_sums_only() -> None:
    assert check_reversibility(chain(updates, 8, 16, False), torch.randn(3, 6, 5, 7)).max_error < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("make", [leapfrogs, updates])
def test_more_bits_are_nearer_to_the_blocks_themselves(make: Make) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)

    def distance(bits: int) -> float:
        net = chain(make, bits, exact=20).double()
        for dropout in (m for m in net.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.0
        plain = x
        for op in copy.deepcopy(net).ops:
            plain = op.block(plain)  # type: ignore[operator, union-attr]
        return float((net(x)[0] - plain).abs().max() / plain.abs().max())

    few, many = distance(4), distance(8)
    assert many < few / 8
    assert many < 0.01


@every_kind
def test_what_is_kept_is_so_many_bits_of_a_number(make: Make, bits: int) -> None:
    net, x = chain(make, bits, depth=3), torch.randn(2, 6, 8, 8, requires_grad=True)
    y = net(x)[0]
    kept, node = [], y.grad_fn.next_functions[0][0]
    nodes = []
    while node is not None and hasattr(node, "records"):
        nodes.append(node)
        kept.append(sum(t.nbytes for t in node.saved_tensors))
        node = node.next_functions[0][0]
    whole = x.numel() * bits / 8
    scales = x.numel() / 64 * 4 if make is updates else 0
    ends = [0.0] if make is leapfrogs else [whole + scales]
    assert kept == [*ends, whole + scales, whole + scales]
    loss((y,)).backward()
    for node in nodes:
        with pytest.raises(RuntimeError, match="freed"):
            _ = node.saved_tensors


@every_kind
def test_a_graph_that_is_retained_is_gone_through_again(make: Make, bits: int) -> None:
    net, x = chain(make, bits), torch.randn(2, 6, 4, 4, requires_grad=True)
    y = loss(net(x))
    first, second = (torch.autograd.grad(y, x, retain_graph=again)[0] for again in (True, False))
    assert first.equal(second)


@pytest.mark.parametrize("op", [Leapfrog(nn.Identity(), 4, exact=True), KeptUpdate(nn.Identity(), exact=True)])
def test_nothing_is_undone_without_what_was_kept(op: Any) -> None:
    ys = op(*[torch.ones(2, 3)] * (2 if isinstance(op, Leapfrog) else 1))
    with pytest.raises(ReversibleError, match="kept in training steps only"):
        op.inverse(*ys)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(5, 3), (8,), (1, 1)])
def test_packing(bits: int, shape: tuple[int, ...]) -> None:
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = pack(integers, bits)
    assert packed.numel() == -(-integers.numel() * bits // 8)
    assert unpack(packed, bits, integers.shape).equal(integers)


@pytest.mark.parametrize("make", [leapfrogs, updates])
def test_lent_blocks_train_and_are_looked_up_anew(make: Make) -> None:
    torch.manual_seed(0)
    owner = nn.Sequential(*(Residual(6) for _ in range(3)))
    net = RevSequential(make([Lent(owner, str(i)) for i in range(3)], 8), exact=True)
    assert not list(net.parameters())
    own = RevSequential(make([copy.deepcopy(block) for block in owner], 8), exact=True)
    x = torch.randn(2, 6, 5, 5)
    for chain_ in (net, own):
        torch.manual_seed(1)
        loss(chain_(x)).backward()
    assert all(p.grad is not None for p in owner.parameters())
    assert all(p.grad.equal(q.grad) for p, q in zip(owner.parameters(), own.parameters(), strict=True))
    owner[1] = nn.Identity()
    assert net.ops[1].block is owner[1]  # type: ignore[union-attr]
    twin = copy.deepcopy((owner, net))
    assert twin[1].ops[0].block is twin[0][0]  # type: ignore[union-attr]


def test_lent_blocks_are_compiled_where_they_are() -> None:
    owner = nn.Sequential(Residual(6))
    compile_branches(RevSequential([KeptUpdate(Lent(owner, "0"))]), backend="eager")
    assert owner[0]._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Leapfrog(nn.Identity(), 3), "bits=3: expected one of 0, 1, 2, 4, 8"),
        (lambda: KeptUpdate(nn.Identity(), 2), "bits=2: expected one of 4, 8, 16"),
        (lambda: Leapfrog(nn.Identity())(torch.ones(1)), "takes two tensors; got 1"),
        (lambda: Leapfrog(nn.Linear(2, 3), start=True)(torch.ones(1, 2)), "keeps the shape"),
        (lambda: KeptUpdate(nn.Linear(2, 3))(torch.ones(1, 2)), "keeps the shape"),
    ],
)
def test_bad_input(make: Callable[[], object], said: str) -> None:
    with pytest.raises((ValueError, ReversibleError), match=said):
        make()
