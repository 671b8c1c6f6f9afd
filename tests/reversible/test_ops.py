"""The contract of every reversible op: shapes, inverse, gradients, and the default backward pass."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from revnets.reversible import AdditiveCoupling, Leapfrog, Parallel, ReversibleOp, RevSequential, RevSilo, SpaceToDepth
from tests.helpers import assert_same_step, training_step
from tests.reversible.graphs import cubic


def _branch(c_in: int, c_out: int, stride: int = 1, up: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.Tanh(), nn.Upsample(scale_factor=up)
    )


def _silo(inputs: int, outputs: int) -> RevSilo:
    channels = (4, 6, 8)
    edges = [(i, j) for i in range(outputs) for j in range(i + 1, outputs)]
    down = {(i, j): _branch(channels[i], channels[j], 2 ** (j - i)) for i, j in edges if i < inputs}
    up = {(j, i): _branch(channels[j], channels[i], up=2 ** (j - i)) for i, j in edges}
    return RevSilo(down, up, inputs)


OPS: dict[str, tuple[Callable[[], ReversibleOp], tuple[tuple[int, ...], ...]]] = {
    "coupling of halves": (lambda: AdditiveCoupling(_branch(3, 2), _branch(2, 3)), ((2, 5, 8, 8),)),
    "coupling of two tensors": (lambda: AdditiveCoupling(_branch(4, 2), _branch(2, 4)), ((2, 4, 8, 8), (2, 2, 8, 8))),
    "silo 1 to 2": (lambda: _silo(1, 2), ((2, 4, 8, 8),)),
    "silo 2 to 3": (lambda: _silo(2, 3), ((2, 4, 8, 8), (2, 6, 4, 4))),
    "silo 3 to 3": (lambda: _silo(3, 3), ((2, 4, 8, 8), (2, 6, 4, 4), (2, 8, 2, 2))),
    "silo, down only": (lambda: RevSilo({(0, 1): _branch(4, 6, 2)}, {}, 2), ((2, 4, 8, 8), (2, 6, 4, 4))),
    "space to depth": (lambda: SpaceToDepth(3, 2, 4), ((2, 3, 8, 8),)),
    "space to depth, oblong": (lambda: SpaceToDepth(2, 4, 3), ((2, 2, 8, 12),)),
    "silo of oblong maps": (lambda: _silo(2, 3), ((2, 4, 8, 12), (2, 6, 4, 6))),
    "repetition": (lambda: SpaceToDepth(3, 1, 8), ((2, 3, 8, 8),)),
    "leapfrog": (lambda: Leapfrog(_branch(4, 4), bits=0), ((2, 4, 8, 8), (2, 4, 8, 8))),
    "leapfrog, the end": (lambda: Leapfrog(_branch(4, 4), end=True), ((2, 4, 8, 8), (2, 4, 8, 8))),
    "leapfrog, the start": (lambda: Leapfrog(_branch(4, 4), bits=0, start=True), ((2, 4, 8, 8),)),
    "leapfrog, all of it": (lambda: Leapfrog(_branch(4, 4), start=True, end=True), ((2, 4, 8, 8),)),
    "parallel": (
        lambda: Parallel([AdditiveCoupling(_branch(c, c), _branch(c, c)) for c in (2, 3)]),
        ((2, 4, 8, 8), (2, 6, 4, 4)),
    ),
}


@pytest.fixture(params=sorted(OPS))
def case(request: pytest.FixtureRequest) -> tuple[ReversibleOp, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, shapes = OPS[request.param]
    return make().double(), tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


Case = tuple[ReversibleOp, tuple[Tensor, ...]]


def test_inverse(case: Case) -> None:
    op, xs = case
    back = op.inverse(*op(*xs))
    assert len(back) == len(xs)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(back, xs, strict=True))


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_inverse_leaves_running_statistics_and_modes_alone(case: Case, exact: bool, chained: bool) -> None:
    """Also in training, where the branches that are evaluated again would move them a second time."""
    op, xs = case
    net = RevSequential([op, *([copy.deepcopy(op)] if len(xs) == len(op(*xs)) and chained else [])], exact=exact)
    if any(x.shape != y.shape for x, y in zip(xs, op(*xs), strict=False)):
        net = RevSequential([op], exact=exact)
    undone = net if chained else op
    ys = undone(*xs)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with torch.set_grad_enabled(chained):
        undone.inverse(*ys)
    assert all(module.training for module in net.modules())
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_gradients(case: Case, mode: str) -> None:
    op, xs = case
    expected = training_step(copy.deepcopy(op), xs, cubic)
    got = training_step(RevSequential([op], mode=mode), xs, cubic)
    got.grads = {name.removeprefix("ops.0."): g for name, g in got.grads.items()}
    got.buffers = {name.removeprefix("ops.0."): b for name, b in got.buffers.items()}
    assert_same_step(got, expected, 1e-9)


def test_default_rewind_equals_the_ops_own(case: Case) -> None:
    op, xs = case
    expected = training_step(RevSequential([copy.deepcopy(op)]), xs, cubic)
    for module in op.modules():
        if isinstance(module, ReversibleOp):
            module.rewind = ReversibleOp.rewind.__get__(module)  # type: ignore[method-assign]
    assert_same_step(training_step(RevSequential([op]), xs, cubic), expected, 1e-9)


def test_space_to_depth_order() -> None:
    x = torch.arange(3 * 4 * 4.0).reshape(1, 3, 4, 4)
    (y,) = SpaceToDepth(3, 4, 4)(x)
    assert y.shape == (1, 64, 1, 1)
    for row in range(4):
        for column in range(4):
            for channel in range(4):
                assert y[0, (row * 4 + column) * 4 + channel] == x[0, channel % 3, row, column]


@pytest.mark.parametrize("repeated", [3, 7])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_space_to_depth_channels_last_is_the_same(layout: torch.memory_format, repeated: int) -> None:
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    op = SpaceToDepth(3, 4, repeated, channels_last=True)
    (expected,) = SpaceToDepth(3, 4, repeated)(x)
    (y,) = op(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, expected)
    assert torch.equal(op.inverse(y)[0], x)
    assert op.eval()(x)[0].is_contiguous()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpaceToDepth(4, 2, 3), "would lose channels: in_chans=4 does not fit in 3"),
        (lambda: RevSilo({(1, 0): nn.ReLU()}, {}, 2), "down branch"),
        (lambda: RevSilo({(0, 1): nn.ReLU()}, {(0, 1): nn.ReLU()}, 2), "up branch"),
        (lambda: RevSilo({}, {(2, 0): nn.ReLU()}, 2), "scale 2 is new but no down branch leads to it"),
        (lambda: RevSilo({(0, 3): nn.ReLU()}, {}, 1), "maps n scales to n or n"),
        (lambda: _silo(2, 2)(torch.ones(1)), "built for 2 inputs, got 1"),
        (lambda: Parallel([SpaceToDepth(1, 1)])(torch.ones(1), torch.ones(1)), "holds 1 ops"),
        (lambda: AdditiveCoupling(nn.ReLU(), nn.ReLU())(torch.ones(1, 1, 2, 2)), "expected at least 2, got 1"),
        (lambda: AdditiveCoupling(nn.ReLU(), nn.ReLU())(*[torch.ones(1)] * 3), "or two; got 3"),
        (lambda: SpaceToDepth(3, 2)(torch.ones(1, 4, 8, 8)), "input has 4 channels, expected in_chans=3"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
