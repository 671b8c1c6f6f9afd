"""Captured training steps: what they leave alone, follow, refuse and tell; a stand-in plays the graph without a GPU."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnets
from revnets.reversible import AdditiveCoupling, RangeError, RevSequential
from revnets.training.capture import step as capture
from revnets.training.capture.step import CaptureError, TrainingStep, capture_step
from revnets.training.guards.finite import FiniteGuard
from tests.training.capture.fake_graph import FakeGraph


@pytest.fixture(params=["eager", "graph"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    FakeGraph.captures = 0
    if request.param == "graph":
        monkeypatch.setattr(capture, "CudaGraph", FakeGraph)
    return str(request.param)


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGraph.captures = 0
    monkeypatch.setattr(capture, "CudaGraph", FakeGraph)


class Net(nn.Module):
    """A reversible chain with dropout and batch norm in its branches, and a classifier."""

    def __init__(self, drop: float = 0.0, exact: bool = True, mode: str = "reversible") -> None:
        super().__init__()
        torch.manual_seed(0)
        ops = [AdditiveCoupling(self.branch(drop), self.branch(drop)) for _ in range(2)]
        self.chain, self.head = RevSequential(ops, mode=mode, exact=exact), nn.Linear(8, 3)

    @staticmethod
    def branch(drop: float) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat(self.chain(x), 1))


def batches(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 8, generator=draw), torch.randint(3, (size,), generator=draw)) for _ in range(count)]


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1 / 64, fused=True)  # a number of float32


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=1 / 8, momentum=0.9, dampening=0.1, fused=True)


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers(), *state)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def plainly(net: Net, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, clip: float | None = None) -> Tensor:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(x), target)
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "store"])
def test_steps_equal_plain_ones_to_the_bit(way: str, make: Any, mode: str) -> None:
    ends, losses = [], []
    for captured in (True, False):
        net = Net(drop=0.5, mode=mode)
        optimizer, data = make(net), batches(5)
        step = capture_step(net, None, optimizer, *data[0], clip_grad=0.5) if captured else None
        torch.manual_seed(7)
        for x, target in data:
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * float(group["lr"])
            losses.append(step(x, target) if step else plainly(net, optimizer, x, target, clip=0.5))
        ends.append([*everything(net, optimizer), torch.get_rng_state()])
        assert isinstance(optimizer.param_groups[0]["lr"], float)
    assert same(losses[:5], losses[5:])
    assert same(*ends)
    assert FakeGraph.captures == (1 if way == "graph" else 0)


@pytest.mark.parametrize("fresh", [True, False])
def test_warm_up_leaves_no_trace(way: str, fresh: bool) -> None:
    net = Net(drop=0.5)
    optimizer, (x, target) = adamw(net), batches(1)[0]
    if not fresh:
        plainly(net, optimizer, x, target)
    before, grads = everything(net, optimizer), [p.grad for p in net.parameters()]
    slots, generators = [id(t) for t in (*net.parameters(), *net.buffers())], (torch.get_rng_state(), random.getstate())
    capture_step(net, lambda y, t: y.square().mean() * random.random(), optimizer, x, target, warmup=2)
    assert same(before, everything(net, optimizer))
    assert [id(t) for t in (*net.parameters(), *net.buffers())] == slots
    assert all(a is b for a, b in zip(grads, (p.grad for p in net.parameters()), strict=True))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]


def test_schedulers_act(graph: None) -> None:
    net = Net()
    optimizer, (x, target) = sgd(net), batches(1)[0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: float(n < 3))
    step = capture_step(net, None, optimizer, x, target)
    moved = []
    for _ in range(5):
        before = net.head.weight.detach().clone()
        step(x, target)
        moved.append(not torch.equal(before, net.head.weight))
        scheduler.step()
    assert moved == [True, True, True, False, False]


def test_other_settings_do_not_and_are_refused(graph: None) -> None:
    net = Net()
    optimizer, (x, target) = sgd(net), batches(1)[0]
    step = capture_step(net, None, optimizer, x, target)
    step(x, target)
    step(x, target)
    optimizer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match=r"momentum of the optimizer's group 0 was 0.9 when captured and is 0.5"):
        step(x, target)
    optimizer.param_groups[0]["momentum"] = 0.9
    revnets.set_mode(net, "store")
    with pytest.raises(ValueError, match="memory mode of Net was changed"):
        step(x, target)
    net.eval()
    with pytest.raises(ValueError, match="Net is in eval mode"):
        step(x, target)


def test_a_loaded_state_is_captured_anew(graph: None) -> None:
    net = Net()
    optimizer, data = adamw(net), batches(6)
    step = capture_step(net, None, optimizer, *data[0])
    for x, target in data[:2]:
        step(x, target)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    ends = []
    for _ in range(2):
        net.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))  # torch takes its tensors over
        for x, target in data[2:]:
            step(x, target)
        ends.append(everything(net, optimizer))
    assert same(*ends)
    assert FakeGraph.captures == 3
    assert not any(group["capturable"] for group in state["param_groups"])  # a CPU could not go on with it


def test_other_shapes_are_refused_or_run_eagerly(way: str) -> None:
    (x, target), (short, few) = batches(1)[0], batches(1, size=4)[0]
    net = Net()
    step = capture_step(net, None, adamw(net), x, target)
    with pytest.raises(ValueError, match=r"captured for x of \(6, 8\) float32 on cpu, got \(4, 8\).*fallback=True"):
        step(short, few)
    with pytest.raises(ValueError, match=r"captured for target of \(6,\) int64"):
        step(x, target.float())
    ends = []
    for run in (True, False):
        net = Net()
        optimizer = adamw(net)
        step = capture_step(net, None, optimizer, x, target, fallback=True) if run else None  # type: ignore[assignment]
        for batch in ((x, target), (x, target), (short, few), (x, target)):
            loss = step(*batch) if run else plainly(net, optimizer, *batch)
            assert loss.isfinite()
        ends.append(everything(net, optimizer))
    assert same(*ends)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_accumulate(way: str, parts: int) -> None:
    data, ends = batches(4), []
    for run in (True, False):
        net = Net()
        optimizer = sgd(net)
        step = capture_step(net, None, optimizer, *data[0], accumulate=parts) if run else None
        for x, target in data:
            if step:
                step(x, target)
                continue
            optimizer.zero_grad()
            for part in zip(x.chunk(parts), target.chunk(parts), strict=True):
                (nn.functional.cross_entropy(net(part[0]), part[1]) / parts).backward()
            optimizer.step()
        ends.append(everything(net, optimizer))
    assert same(*ends)
    with pytest.raises(ValueError, match="a batch of 6 has no 4 equal parts"):
        capture_step(net, None, optimizer, *data[0], accumulate=4)


@pytest.mark.parametrize("bad", [1e9, float("nan")])
def test_a_value_out_of_range_leaves_the_update_out_and_is_told(way: str, bad: float) -> None:
    net = Net()
    optimizer, (x, target) = sgd(net), batches(1)[0]
    step = capture_step(net, None, optimizer, x, target)
    step(x, target)
    step(x, target)
    assert step.settle()
    before = [*(p.detach().clone() for p in net.parameters())]
    with pytest.raises(RangeError, match=r"op 0 \(AdditiveCoupling\)"):  # noqa: PT012
        step(torch.full_like(x, bad), target)
        step(x, target)  # at the latest
    assert not step.settle()
    assert step.skipped == 1
    assert same(before, list(net.parameters()))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    assert step(x, target).isfinite()
    assert step.settle()


def test_the_guard_of_numbers_skips_and_puts_statistics_back(way: str) -> None:
    net = Net(exact=False)
    optimizer, (x, target) = adamw(net), batches(1)[0]
    guard = FiniteGuard(net, limit=2)
    step = capture_step(net, None, optimizer, x, target, guard=guard)
    guard.start()
    for _ in range(3):
        step(x, target)
    assert step.settle()
    before = [t for t in everything(net, optimizer) if t.is_floating_point()]  # counts of batches go on
    for count in (1, 2):
        step(torch.full_like(x, torch.inf), target)
        assert not step.settle()
        assert (guard.in_a_row, guard.skipped, step.skipped) == (count, count, count)
    assert guard.exhausted
    assert same(before, [t for t in everything(net, optimizer) if t.is_floating_point()])
    step(x, target)
    step(x, target)
    assert (step.settle(), guard.in_a_row) == (True, 0)


def test_a_bad_first_step_makes_no_state(graph: None) -> None:
    net = Net(exact=False)
    optimizer, (x, target) = sgd(net), batches(1)[0]
    guard = FiniteGuard(net, limit=5)
    step = capture_step(net, None, optimizer, x, target, guard=guard)
    guard.start()
    step(torch.full_like(x, torch.inf), target)
    assert not optimizer.state
    step(x, target)
    assert not step.captured
    step(x, target)
    assert step.captured


def test_a_loss_scaler_skips_on_the_device(way: str) -> None:
    scales, ends = [], []
    for run in (True, False):
        net, data = Net(exact=False), batches(4)
        optimizer, scaler = adamw(net), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        step = capture_step(net, None, optimizer, *data[0], scaler=scaler) if run else None
        statistics = copy.deepcopy(dict(net.named_buffers()))
        for number, (x, target) in enumerate(data):
            x = torch.full_like(x, torch.nan) if number == 2 else x
            if step:
                step(x, target)
                assert step.settle() == (number != 2)
            else:
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(net(x), target)).backward()
                scaler.step(optimizer)
                scaler.update()
            if number == 2:
                net.load_state_dict(statistics, strict=False)
        scales.append(scaler.state_dict())
        ends.append(everything(net, optimizer))
    assert scales[0] == scales[1]
    assert same(*ends)


def test_what_cannot_be_captured_is_refused(graph: None, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, target) = Net(), batches(1)[0]
    with pytest.raises(ValueError, match="optimizer Adagrad computes on the host"):
        capture_step(net, None, torch.optim.Adagrad(net.parameters()), x, target)
    with pytest.raises(ValueError, match=r"NAdam cannot leave out an update.*exact mode's range check"):
        capture_step(net, None, torch.optim.NAdam(net.parameters()), x, target)
    with pytest.raises(ValueError, match=r"Net is in eval mode.*model.train\(\)"):
        capture_step(net.eval(), None, adamw(net), x, target)
    with pytest.raises(ValueError, match="tensors on cpu, the input is on meta"):
        capture_step(net.train(), None, adamw(net), x.to("meta"), target)
    monkeypatch.setattr(capture, "several", lambda: True)
    with pytest.raises(ValueError, match="several processes"):
        capture_step(net, None, adamw(net), x, target)


def test_a_device_that_refuses_is_quoted(graph: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeGraph, run: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(FakeGraph, "capture", refuse)
    net, (x, target) = Net(), batches(1)[0]
    step = capture_step(net, None, adamw(net), x, target)
    step(x, target)
    with pytest.raises(CaptureError, match=r"a step of Net cannot be captured.*operation not permitted"):
        step(x, target)


def test_it_is_exported() -> None:
    assert revnets.capture_step is capture_step
    assert isinstance(capture_step(nn.Linear(1, 2), None, adamw(n := nn.Linear(1, 2)), *_tiny(n)), TrainingStep)


def _tiny(_: nn.Module) -> tuple[Tensor, Tensor]:
    return torch.ones(2, 1), torch.zeros(2, dtype=torch.long)


def test_draws_are_given_again() -> None:
    from revnets.reversible.draws import DrawnAgain, Draws

    def draw() -> Iterator[Tensor]:
        yield torch.rand(3)
        yield torch.empty(3).bernoulli_(0.5)
        yield torch.ones(3).mul_(torch.normal(torch.zeros(3), 1.0))
        out = torch.empty(3)
        torch.rand(3, out=out)
        yield out
        yield nn.functional.dropout(torch.ones(3)).add_(1)
        yield nn.functional.scaled_dot_product_attention(*(torch.ones(1, 1, 2, 2),) * 3).flatten()

    kept: list[Any] = []
    with Draws(kept):
        first = list(draw())
    for _ in range(2):
        state = torch.get_rng_state()
        with DrawnAgain(kept):
            assert same(first, list(draw()))
        assert torch.equal(state, torch.get_rng_state())


# --- on a GPU ---------------------------------------------------------------------------------------------------------

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


def on_gpu(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    return net.cuda(), [(x.cuda(), target.cuda()) for x, target in data]


def trained(make: Callable[[], nn.Module], graph: bool, amp: torch.dtype | None, data: Any) -> list[Tensor]:
    net, data = on_gpu(make(), data)
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    step = capture_step(net.train(), None, optimizer, *data[0], amp_dtype=amp, clip_grad=1.0, graph=graph)
    torch.manual_seed(3)
    losses = []
    for x, target in data:
        losses.append(step(x, target))
        scheduler.step()
    assert step.settle()
    assert step.captured == graph
    return [*losses, *everything(net, optimizer), torch.cuda.get_rng_state()]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("mode", [pytest.param(m, marks=gpu) for m in ("reversible", "checkpoint", "store")])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_gpu_captured_steps_equal_eager_ones(
    deterministic: None, mode: str, amp: torch.dtype | None, drop: float
) -> None:
    found = [trained(lambda: Net(drop, mode=mode), graph, amp, batches(8)) for graph in (True, False)]
    assert same(*found)


@pytest.mark.parametrize("drop_path", [pytest.param(rate, marks=gpu) for rate in (0.0, 0.3)])
def test_gpu_a_network_captured_equals_itself_eager(deterministic: None, drop_path: float) -> None:
    import timm

    def make() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("test_revbifpn", num_classes=3, drop_path_rate=drop_path)

    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 3, 64, 64, generator=draw), torch.arange(4) % 3) for _ in range(5)]
    again = [trained(make, False, None, data) for _ in range(2)]
    captured = trained(make, True, None, data)
    # kernels without a deterministic version (bilinear upsampling) differ from run to run: those cannot be compared
    assert all(torch.equal(a, c) for a, b, c in zip(*again, captured, strict=True) if torch.equal(a, b))


@pytest.mark.parametrize("bad", [pytest.param(value, marks=gpu) for value in (1e9, float("nan"))])
def test_gpu_a_range_error_is_raised_one_step_later(bad: float) -> None:
    net, [(x, target)] = on_gpu(Net(), batches(1))
    step = capture_step(net, None, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), x, target)
    for _ in range(3):
        step(x, target)
    before = [p.detach().clone() for p in net.parameters()]
    step(torch.full_like(x, bad), target)
    with pytest.raises(RangeError, match=r"op 0 \(AdditiveCoupling\)"):
        step(x, target)
    assert same(before, list(net.parameters()))


@pytest.mark.parametrize("make", [pytest.param(m, marks=gpu) for m in (adamw, sgd)])
def test_gpu_a_loss_scaler_acts_within_the_graph(make: Any) -> None:
    net, data = on_gpu(Net(exact=False), batches(4))
    optimizer, scaler = make(net), torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=100)
    step = capture_step(net, None, optimizer, *data[0], scaler=scaler, amp_dtype=torch.float16)
    for x, target in data[:3]:
        step(x, target)
    assert step.settle()
    before = [p.detach().clone() for p in net.parameters()]
    step(torch.full_like(data[3][0], torch.inf), data[3][1])
    assert not step.settle()
    assert scaler.get_scale() == 4.0
    assert same(before, list(net.parameters()))
