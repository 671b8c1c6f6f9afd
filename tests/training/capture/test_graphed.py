"""Captured passes of a part of a network: equal to ordinary ones for every shape, or ordinary and said so.

``FakeGraph`` plays the graph without a GPU: it repeats operators on the tensors of the capture, and no code.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets
from revnets.reversible import AdditiveCoupling, RangeError, ReversibleError, RevSequential
from revnets.reversible.draws import Draws
from revnets.training.capture import graphed
from revnets.training.capture.cuda_graph import CaptureError
from revnets.training.capture.graphed import FIRST, HOOKED, MORE, OPEN, REPLAYED, WATCHED, WITH_GRADIENT, GraphedPart
from tests.training.capture.fake_graph import FakeGraph

SHAPES = [(4, 8), (4, 8), (6, 8), (4, 8), (6, 8), (6, 8), (4, 8)]


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGraph.captures = 0
    monkeypatch.setattr(graphed, "CudaGraph", FakeGraph)


class Net(nn.Module):
    """A reversible chain with dropout and batch norm in its branches; two outputs."""

    def __init__(self, mode: str = "reversible", exact: bool = True, drop: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        ops = [AdditiveCoupling(self.branch(drop), self.branch(drop)) for _ in range(2)]
        self.stem, self.chain = nn.Linear(8, 8), RevSequential(ops, mode=mode, exact=exact)
        self.head = nn.Linear(8, 3)

    @staticmethod
    def branch(drop: float) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(drop))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        (y,) = self.chain(self.stem(x))
        return y, self.head(y)


def inputs(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def loss_of(outputs: Any) -> Tensor:
    return sum((y.float().square().mean() / (k + 1) for k, y in enumerate(outputs)), torch.zeros(()))


def trained(net: nn.Module, call: Callable[[Tensor], Any], data: list[Tensor], every: int = 1) -> list[Any]:
    """Losses, gradients and state of a training, and the generator's."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(7)
    found: list[Any] = []
    for number, x in enumerate(data):
        loss = loss_of(call(x))
        loss.backward()
        found.append(loss.detach())
        found += [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        if number % every == every - 1:
            optimizer.step()
            optimizer.zero_grad()
    return [*found, *(t.detach().clone() for t in (*net.parameters(), *net.buffers())), torch.get_rng_state()]


def same(a: list[Any], b: list[Any]) -> bool:
    pairs = zip(a, b, strict=True)
    return len(a) == len(b) and all(x is y is None or torch.equal(x, y) for x, y in pairs)


def under(amp: torch.dtype | None, call: Callable[[Tensor], Any], kind: str = "cpu") -> Callable[[Tensor], Any]:
    """``call`` under autocast, as a training's forward pass."""

    def run(x: Tensor) -> Any:
        with torch.autocast(kind, dtype=amp, enabled=amp is not None):
            return call(x)

    return run


def both(
    make: Callable[[], nn.Module], data: list[Tensor], every: int = 1, amp: torch.dtype | None = None
) -> GraphedPart:
    """A training with graphs that equals the one without to the bit."""
    plain, net = make(), make()
    part = GraphedPart(net)
    assert same(trained(net, under(amp, part), data, every), trained(plain, under(amp, plain), data, every))
    return part


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "store"])
def test_passes_of_several_shapes_equal_ordinary_ones_to_the_bit(graph: None, mode: str, every: int) -> None:
    part = both(lambda: Net(mode), inputs(SHAPES), every)
    assert part.counts == {FIRST: 2, REPLAYED: 5}
    assert FakeGraph.captures == 4  # a forward and a backward pass of two shapes


@pytest.mark.parametrize(("amp", "last"), [(None, False), (torch.bfloat16, False), (torch.float16, True)])
def test_a_network_of_ours_with_drop_path(graph: None, amp: torch.dtype | None, last: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        levels = (3,) if last else (0, 1, 2, 3)
        net = timm.create_model("test_revbifpn", features_only=True, out_indices=levels, drop_path_rate=0.5)
        return net.to(memory_format=torch.channels_last)

    data = inputs([(2, 3, 16, 16), (2, 3, 16, 32), (2, 3, 16, 16), (2, 3, 16, 32), (2, 3, 16, 16)])
    part = both(make, [x.contiguous(memory_format=torch.channels_last) for x in data], amp=amp)
    assert part.counts == {FIRST: 2, REPLAYED: 3}


def test_a_pass_is_captured_for_each_precision(graph: None) -> None:
    net, (x,) = Net(exact=False), inputs([(4, 8)])
    part, plain = GraphedPart(net), copy.deepcopy(net)
    for amp in (False, False, True, True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            torch.manual_seed(1)
            found = part(x)
            torch.manual_seed(1)
            expected = plain(x)
        loss_of(found).backward()
        loss_of(expected).backward()
        assert same(list(found), list(expected))
    assert part.counts == {FIRST: 2, REPLAYED: 4}
    assert same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_an_output_that_nobody_trains(graph: None) -> None:
    def first(net: nn.Module) -> Callable[[Tensor], Any]:
        part = GraphedPart(net)
        return lambda x: part(x)[:1]

    plain, net = Net(), Net()
    data = inputs([(4, 8)] * 4)
    assert same(trained(net, first(net), data), trained(plain, lambda x: plain(x)[:1], data))

    net = Net()
    part = GraphedPart(net)
    for x in data[:2]:
        part(x)[0].sum().backward()
    with pytest.raises(ReversibleError, match="gradients of outputs that had none when its passes were captured"):
        loss_of(part(data[0])).backward()


def test_gradients_are_the_callers_own(graph: None) -> None:
    net, data = Net(), inputs([(4, 8)] * 4)
    part = GraphedPart(net)
    part(data[0])[0].sum().backward()
    net.zero_grad()
    outputs = part(data[1])
    kept = outputs[0].detach().clone()
    outputs[0].sum().backward()
    weight = net.stem.weight
    assert weight.grad is not None
    grad, former = weight.grad, weight.grad.clone()
    weight.grad = None
    part(data[2])[0].sum().backward()
    assert torch.equal(grad, former)  # a later replay writes elsewhere
    assert torch.equal(outputs[0], kept)
    assert not torch.equal(weight.grad, former)


# --- what runs eagerly ------------------------------------------------------------------------------------------------


def test_more_shapes_than_graphs_run_eagerly_and_it_is_said_once(graph: None) -> None:
    said: list[str] = []
    plain, net = Net(), Net()
    part = GraphedPart(net, 1, said.append)
    data = inputs(SHAPES)
    assert same(trained(net, part, data), trained(plain, plain, data))
    assert part.counts == {FIRST: 1, REPLAYED: 3, MORE: 3}
    assert said == [
        "cuda_graph: Net also runs eagerly, as there are more shapes than graphs (4x8): pad images to fewer shapes "
        "(pad_size_divisor), or raise max_graphs=1"
    ]


def test_a_shape_that_comes_no_more_makes_room(graph: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "STALE", 3)
    plain, net = Net(), Net()
    part, data = GraphedPart(net, 1, lambda _: None), inputs([(4, 8)] * 3 + [(6, 8)] * 6)
    assert same(trained(net, part, data), trained(plain, plain, data))
    assert part.counts == {FIRST: 2, REPLAYED: 4, MORE: 3}


def test_evaluation_runs_eagerly_and_is_not_counted(graph: None) -> None:
    net, (x,) = Net(), inputs([(4, 8)])
    part = GraphedPart(net)
    for _ in range(3):
        with torch.no_grad():
            part(x)
        net.eval()
        assert same(list(part(x)), list(net(x)))
        net.train()
    assert not part.counts
    assert FakeGraph.captures == 0


def test_hooks_run_eagerly(graph: None) -> None:
    net, data = Net(), inputs([(4, 8)] * 5)
    part = GraphedPart(net, say=lambda _: None)
    called: list[int] = []
    for number, x in enumerate(data):
        handle = net.stem.register_forward_hook(lambda *_: called.append(0)) if number == 3 else None
        loss_of(part(x)).backward()
        if handle:
            handle.remove()
    assert len(called) == 1
    assert part.counts == {FIRST: 1, REPLAYED: 3, HOOKED: 1}


def test_a_call_before_the_backward_pass_of_the_last_one_runs_eagerly(graph: None) -> None:
    def twice(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda x: [*call(x), *call(x + 1)]

    plain, net, data = Net(), Net(), inputs([(4, 8)] * 4)
    part = GraphedPart(net, say=lambda _: None)
    assert same(trained(net, twice(part), data), trained(plain, twice(plain), data))
    assert part.counts == {FIRST: 2, REPLAYED: 3, OPEN: 3}
    part(data[0])  # nobody wants its gradient
    part(data[0])
    before = part.counts[OPEN]
    loss_of(part(data[0])).backward()
    assert part.counts[OPEN] == before


@pytest.mark.parametrize("why", [WITH_GRADIENT, WATCHED])
def test_inputs_with_gradient_and_watchers_run_eagerly(graph: None, why: str) -> None:
    net, (x,) = Net(drop=0.0), inputs([(4, 8)])
    part = GraphedPart(net, say=lambda _: None)
    for _ in range(2):
        loss_of(part(x)).backward()
    if why is WITH_GRADIENT:
        loss_of(part(x.requires_grad_())).backward()
        assert x.grad is not None
    else:
        with Draws(drawn := []):
            part(x)
        assert not drawn
    assert part.counts == {FIRST: 1, REPLAYED: 1, why: 1}


# --- what is followed and refused -------------------------------------------------------------------------------------


def test_parts_that_are_frozen_and_modes_that_change_are_followed(graph: None) -> None:
    def change(net: nn.Module, number: int) -> None:
        net.stem.weight.requires_grad_(number != 2)
        if number == 4:
            revnets.set_mode(net, "store")
        net.chain.ops[0].train(number != 6)

    plain, net = Net(drop=0.0), Net(drop=0.0)
    part = GraphedPart(net, 8)
    for number in range(8):
        for each, call in ((net, part), (plain, plain)):
            change(each, number)
            each.zero_grad()
            for x in inputs([(4, 8)] * 2):
                loss_of(call(x)).backward()
        assert same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
        assert same(list(net.buffers()), list(plain.buffers()))
    assert part.counts[REPLAYED] > part.counts[FIRST] > 3


def test_weights_that_are_moved_are_captured_again(graph: None) -> None:
    net, data = Net(drop=0.0), inputs([(4, 8)] * 5)
    part = GraphedPart(net)
    for number, x in enumerate(data):
        if number == 3:
            for p in net.parameters():
                p.data = p.data + 1.0
        plain = copy.deepcopy(net)
        assert same(list(part(x)), list(plain(x)))
        loss_of(net(x)).backward()
        loss_of(part(x)).backward()
    assert FakeGraph.captures == 4


def test_copies_have_graphs_of_their_own(graph: None) -> None:
    net, data = Net(), inputs([(4, 8)] * 2)
    part = GraphedPart(net)
    for x in data:
        loss_of(part(x)).backward()
    other = copy.deepcopy(part)
    assert other.module is not net
    assert not other.counts
    assert pickle.loads(pickle.dumps(part)).limit == 4


@pytest.mark.parametrize("bad", [1e9, float("nan")])
def test_a_value_out_of_range_is_an_error_as_ever(graph: None, bad: float) -> None:
    net, (x,) = Net(), inputs([(4, 8)])
    part = GraphedPart(net)
    for _ in range(2):
        loss_of(part(x)).backward()
    with pytest.raises(RangeError, match=r"op 0 \(AdditiveCoupling\)"):
        part(torch.full_like(x, bad))
    loss_of(part(x)).backward()
    assert part.counts == {FIRST: 1, REPLAYED: 3}


def test_backward_passes_that_would_be_wrong_are_refused(graph: None) -> None:
    net, (x,) = Net(), inputs([(4, 8)])
    part = GraphedPart(net)
    for _ in range(2):
        loss_of(part(x)).backward()
    loss = loss_of(part(x))
    loss.backward(retain_graph=True)
    with pytest.raises(ReversibleError, match="second backward pass through a replayed graph"):
        loss.backward()
    loss = loss_of(part(x))
    with torch.no_grad():
        net.stem.weight.add_(1.0)
    with pytest.raises(ReversibleError, match=r"Net: parameter stem\.weight was changed in place"):
        loss.backward()
    del loss
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(loss_of(part(x)), net.stem.weight, create_graph=True)[0].sum().backward()


def test_what_looks_at_numbers_cannot_be_captured(graph: None) -> None:
    class Curious(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if x.sum().item() > 0 else 1.0)

    net, (x,) = Curious(8, 2), inputs([(4, 8)])
    part = GraphedPart(net)
    loss_of(part(x)).backward()
    with pytest.raises(CaptureError, match="forward pass of Curious cannot be captured in a CUDA graph"):
        part(x)


def test_several_processes_and_no_graphs_are_refused(graph: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (x,) = inputs([(4, 8)])
    monkeypatch.setattr(graphed, "several", lambda: True)
    with pytest.raises(ValueError, match="several processes"):
        GraphedPart(Net())(x)
    with pytest.raises(ValueError, match="max_graphs"):
        GraphedPart(Net(), 0)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("mode", [pytest.param(m, marks=gpu) for m in ("reversible", "checkpoint", "store")])
@pytest.mark.parametrize("every", [1, 3])
def test_gpu_passes_of_several_shapes_equal_ordinary_ones(deterministic: None, mode: str, every: int) -> None:
    data = [x.cuda() for x in inputs(SHAPES)]
    found = []
    for captured in (True, False):
        net = Net(mode).cuda()
        part = GraphedPart(net)
        found.append([*trained(net, part if captured else net, data, every), torch.cuda.get_rng_state()])
        assert part.counts == ({FIRST: 2, REPLAYED: 5} if captured else {})
    assert same(*found)


@pytest.mark.parametrize("amp", [pytest.param(t, marks=gpu) for t in (None, torch.bfloat16, torch.float16)])
def test_gpu_a_network_captured_equals_itself_eager(deterministic: None, amp: torch.dtype | None) -> None:
    shapes: list[tuple[int, ...]] = [(2, 3, 64, 64), (2, 3, 64, 96)] * 3
    found = []
    for captured in (True, False, False):
        torch.manual_seed(0)
        net = timm.create_model("test_revbifpn", features_only=True, drop_path_rate=0.3).cuda()
        part = GraphedPart(net)
        call = under(amp, part if captured else net, "cuda")
        found.append(trained(net, call, [x.cuda() for x in inputs(shapes)]))
        assert part.counts == ({FIRST: 2, REPLAYED: 4} if captured else {})
    # kernels without a deterministic version (bilinear upsampling) differ from run to run: those cannot be compared
    assert all(torch.equal(c, a) for c, a, b in zip(*found, strict=True) if torch.equal(a, b))


@pytest.mark.parametrize("bad", [pytest.param(value, marks=gpu) for value in (1e9, float("nan"))])
def test_gpu_a_value_out_of_range_is_an_error_of_the_backward_pass(bad: float) -> None:
    net, x = Net().cuda(), inputs([(4, 8)])[0].cuda()
    part = GraphedPart(net)
    for _ in range(3):
        loss_of(part(x)).backward()
    with pytest.raises(RangeError, match=r"op 0 \(AdditiveCoupling\)"):
        loss_of(part(torch.full_like(x, bad))).backward()
    loss_of(part(x)).backward()
