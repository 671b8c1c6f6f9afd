"""Gradients of the engine are those of autograd, whatever is shared, strided, frozen, unused or in half precision."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.reversible import MODES, AdditiveCoupling, Parallel, ReversibleOp, RevSequential, RevSilo
from tests.helpers import assert_same_step, training_step
from tests.reversible.graphs import build, cubic
from tests.reversible.test_ops import OPS

ENGINE = ("reversible", "checkpoint")


def tensors(count: int, shape: tuple[int, ...] = (3, 4)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count))


def assert_modes_agree(net: RevSequential, xs: tuple[Tensor, ...], loss: Callable[..., Tensor] = cubic) -> None:
    expected = training_step(copy.deepcopy(net), xs, loss, "store")
    for mode in ENGINE:
        assert_same_step(training_step(copy.deepcopy(net), xs, loss, mode), expected, 1e-9)


# --- shared parameters -----------------------------------------------------------------------------------------------


def _tied(first: nn.Linear) -> nn.Linear:
    second = nn.Linear(4, 4)
    second.weight = first.weight
    return second


def _one_module(f: nn.Linear) -> tuple[ReversibleOp, int]:
    return AdditiveCoupling(nn.Sequential(f, nn.Tanh()), nn.Sequential(f, nn.Sigmoid())), 2


def _one_weight(f: nn.Linear) -> tuple[ReversibleOp, int]:
    return AdditiveCoupling(nn.Sequential(f, nn.Tanh()), nn.Sequential(_tied(f), nn.Tanh())), 2


def _among_scales(f: nn.Linear) -> tuple[ReversibleOp, int]:
    down = {(0, 1): _tied(f), (0, 2): nn.Sequential(f, nn.Tanh()), (1, 2): nn.Linear(4, 4)}
    return RevSilo(down, {(1, 0): f, (2, 0): nn.Sequential(_tied(f), nn.Tanh())}, 3), 3


def _side_by_side(f: nn.Linear) -> tuple[ReversibleOp, int]:
    halves = [AdditiveCoupling(nn.Sequential(nn.Linear(2, 4), f, nn.Linear(4, 2)), nn.Linear(2, 2)) for _ in range(2)]
    return Parallel(halves), 2


SHARED = (_one_module, _one_weight, _among_scales, _side_by_side)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("make", SHARED)
def test_a_parameter_of_several_branches_gets_the_sum(
    make: Callable[[nn.Linear], tuple[ReversibleOp, int]], hooked: bool
) -> None:
    torch.manual_seed(0)
    op, count = make(nn.Linear(4, 4))
    net = RevSequential([op]).double()
    if not hooked:
        assert_modes_agree(net, tensors(count))
        return
    results = []
    for mode in ("store", "reversible"):
        one = copy.deepcopy(net)
        for p in one.parameters():
            p.register_hook(lambda grad: 2 * grad + 1)  # once, on the sum: else it adds 1 for each branch
        results.append(training_step(one, tensors(count), cubic, mode))
    assert_same_step(results[1], results[0], 1e-9)


def test_a_parameter_of_several_ops_gets_the_sum() -> None:
    torch.manual_seed(0)
    f = nn.Linear(4, 4)
    ops = [AdditiveCoupling(nn.Sequential(f, nn.Tanh()), nn.Sequential(_tied(f), nn.Tanh())) for _ in range(3)]
    assert_modes_agree(RevSequential(ops).double(), tensors(2))


# --- inputs and outputs that take no part ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ENGINE)
@pytest.mark.parametrize("name", sorted(OPS))
def test_any_of_the_inputs_may_need_a_gradient(name: str, mode: str) -> None:
    make, shapes = OPS[name]
    torch.manual_seed(0)
    op = make().double()
    xs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for needed in product([False, True], repeat=len(xs)):
        found = []
        for one in ("store", mode):
            net = RevSequential([copy.deepcopy(op)], mode=one)
            inputs = [x.clone().requires_grad_(n) for x, n in zip(xs, needed, strict=True)]
            wanted = [*(x for x in inputs if x.requires_grad), *net.parameters()]
            if wanted:
                found.append(torch.autograd.grad(cubic(net(*inputs)), wanted, allow_unused=True))
        for got, expected in zip(*found, strict=True) if found else ():
            assert (got is None) == (expected is None), needed
            assert got is None or torch.allclose(got, expected, rtol=1e-8, atol=1e-12), needed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_gradients_pass_through_ops_that_are_frozen(needed: tuple[bool, bool], mode: str) -> None:
    """Against the ops one after the other: a chain leaves out what comes before the first that takes part."""
    torch.manual_seed(0)
    ops = [AdditiveCoupling(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)).double() for _ in range(3)]
    ops[0].requires_grad_(False)
    found = []
    for chained in (True, False):
        inputs = [x.requires_grad_(n) for x, n in zip(tensors(2), needed, strict=True)]
        ys: Any = RevSequential(ops, mode=mode)(*inputs) if chained else ops[2](*ops[1](*ops[0](*inputs)))
        wanted = [*(x for x in inputs if x.requires_grad), *ops[1].parameters(), *ops[2].parameters()]
        found.append(torch.autograd.grad(cubic(ys), wanted))
    for got, expected in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(OPS))
def test_any_of_the_outputs_may_be_unused(name: str) -> None:
    make, shapes = OPS[name]
    torch.manual_seed(0)
    net = RevSequential([make(), *([make()] if name.startswith("coupling") else [])]).double()
    xs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for used in range(len(net(*xs))):
        assert_modes_agree(net, xs, lambda ys, used=used: cubic((ys[used],)))


class Sum(ReversibleOp):
    """Leaves the backward pass to the engine; where its second output is unused, both gradients are one tensor."""

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        a, b = xs
        return a + b, b

    def inverse(self, *ys: Tensor) -> tuple[Tensor, ...]:
        a, b = ys
        return a - b, b


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_that_are_one_tensor_are_not_changed_together(used: int) -> None:
    torch.manual_seed(0)
    ops = [AdditiveCoupling(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())), Sum()]
    assert_modes_agree(RevSequential(ops).double(), tensors(2), lambda ys: cubic((ys[used],)))


# --- branches that give what they were given -------------------------------------------------------------------------


class Own(nn.Module):
    """Gives a parameter, or a view of one."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.weight, self.view = nn.Parameter(torch.randn(3, 4)), view

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.view_as(x) if self.view else self.weight


class View(nn.Module):
    """Gives its input by another name."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0).flip(0) if x.dim() == 1 else x.unsqueeze(0).squeeze(0)


class Added(nn.Module):
    """As embeddings of positions are added: where nothing is broadcast, their gradient is that of the sum itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + self.weight


DISGUISES: dict[str, Callable[[], nn.Module]] = {
    "input": nn.Identity,
    "view of the input": View,
    "parameter": lambda: Own(view=False),
    "view of a parameter": lambda: Own(view=True),
    "sum with a parameter": Added,
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", DISGUISES)
def test_a_branch_may_give_its_input_or_a_parameter(name: str, exact: bool) -> None:
    torch.manual_seed(0)
    make = DISGUISES[name]
    edges = {(0, 1): make(), (0, 2): make(), (1, 2): nn.Linear(4, 4)}
    back = {(1, 0): make(), (2, 0): nn.Linear(4, 4), (2, 1): make()}
    ops = [RevSilo(edges, back, 3), Parallel([AdditiveCoupling(nn.Tanh(), nn.Tanh()) for _ in range(3)])]
    assert_modes_agree(RevSequential(ops, exact=exact).double(), tensors(3))
    coupling = RevSequential([AdditiveCoupling(make(), nn.Linear(4, 4)), AdditiveCoupling(nn.Tanh(), make())])
    assert_modes_agree(coupling.double(), tensors(2))


# --- strides and precision -------------------------------------------------------------------------------------------


class Witness(nn.Module):
    """A branch that notes, in the backward pass, whether the gradient it is handed has gaps in memory."""

    def __init__(self, seen: list[Any], name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen, self.name = seen, name

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x * self.weight)
        if y.requires_grad:
            y = _Note.apply(y, self)
        return y


class _Note(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, witness: Witness) -> Tensor:
        ctx.witness = witness
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dense = torch.ops.aten.is_non_overlapping_and_dense(grad)
        ctx.witness.seen.append((ctx.witness.name, bool(dense), grad.dtype))
        return grad, None


@pytest.mark.parametrize("channels_last", [False, True])
def test_branches_are_handed_gradients_as_autograd_would(channels_last: bool) -> None:
    """Kernels round differently on gradients with gaps, and gradients are to equal stored ones to the bit."""
    found: dict[str, set[Any]] = {}
    for mode in ("store", "reversible"):
        seen: list[Any] = []
        couplings = [AdditiveCoupling(Witness(seen, f"f{i}"), Witness(seen, f"g{i}")) for i in range(3)]
        x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        cubic(RevSequential(couplings, mode=mode, exact=True)(x)).backward()
        assert len(seen) == 6
        found[mode] = set(seen)
    assert found["reversible"] == found["store"]
    assert all(dense for name, dense, _ in found["reversible"] if name.startswith("f"))


@pytest.mark.parametrize("kinds", [["conv"], ["batch_norm"], ["mbconv_plain"]])
def test_branches_in_half_precision_under_a_stream_of_float32(kinds: list[str]) -> None:
    net = build([1, 2, 3], kinds, exact=True)
    x = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)
    expected = training_step(copy.deepcopy(net), x, cubic, "store", autocast=True)
    for mode in ENGINE:
        got = training_step(copy.deepcopy(net), x, cubic, mode, autocast=True)
        assert_same_step(got, expected, 0)
        assert {g.dtype for g in got.grads.values() if g is not None} == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exact", [False, True])
def test_the_stream_stays_in_float32_under_autocast(exact: bool, mode: str) -> None:
    """Also a scale that only branches in half precision make."""
    net = RevSequential(list(build([1, 2, 3, 3], ["conv", "mbconv_plain"], exact=exact).ops), mode=mode, exact=exact)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for train in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ys = net.train(train)(x)
        assert {y.dtype for y in ys} == {torch.float32}
    assert {y.dtype for y in net.inverse(*(y.detach() for y in ys))} == {torch.float32}


@pytest.mark.parametrize("name", sorted(name for name in OPS if not name.startswith(("space", "repet"))))
def test_half_precision_where_the_engine_rewinds_by_itself(name: str) -> None:
    """The inverse runs without gradient first: no cast that it made may stand in for a weight afterwards."""
    make, shapes = OPS[name]
    torch.manual_seed(0)
    net = RevSequential([make()], exact=True)
    for module in net.modules():
        if isinstance(module, ReversibleOp):
            module.rewind = ReversibleOp.rewind.__get__(module)  # type: ignore[method-assign]
    xs = tuple(torch.randn(shape) for shape in shapes)
    found = []
    for mode in ("reversible", "store"):
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.reset_running_stats()
        found.append(training_step(net, xs, cubic, mode, autocast=True))
    assert_same_step(found[0], found[1], 5e-2)


# --- parts of a chain that trains are in eval ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ENGINE)
@pytest.mark.parametrize("which", ["all", "first", "last", "inner"])
def test_ops_in_eval_round_where_their_chain_trains(which: str, mode: str) -> None:
    net = build([1, 2, 3, 3], ["conv", "batch_norm"], exact=True)
    ops = list(net.ops)
    chosen = {"all": ops, "first": ops[:2], "last": ops[-1:], "inner": [m for op in ops[1::2] for m in op.children()]}
    for module in chosen[which]:
        module.eval()
    x = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)
    expected = training_step(copy.deepcopy(net), x, cubic, "store")
    assert_same_step(training_step(copy.deepcopy(net), x, cubic, mode), expected, 0)
