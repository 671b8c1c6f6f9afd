"""Plans that leave out passes over memory, against torch: random programs of everything that the kernel computes."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.deploy.runners import torch_threads
from revnets.kernels.build import CONVOLUTION, COPY, DEPTHWISE, MAP, SCALE, UPSAMPLE, Geometry, kernel_problem
from revnets.kernels.calls import CatCall, ConvCall, MapCall, MeanCall, ScaleCall, SliceCall, UpsampleCall
from revnets.kernels.compressed import activate, compress
from revnets.kernels.fuse import fuse
from revnets.kernels.plan import Plan, Step

pytestmark = pytest.mark.skipif(kernel_problem() is not None, reason=f"no kernel: {kernel_problem()}")
Programs = list[tuple[str, int, int]]
ACTS = ("none", "relu6", "hardswish", "silu", "hardsigmoid")
KINDS = (
    "conv",
    "1x1",
    "1x1 of one pixel",
    "depthwise",
    "wide",
    "mean",
    "gates",
    "sum",
    "slice",
    "cat",
    "upsampled sum",
)


def weights(*shape: int) -> Tensor:
    """Half of them zeros."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return torch.where(w > 0, w, 0.0) / 2


class Program:
    """Steps of a plan with what torch computes in their place. Values are images of any channels, sizes (H, W), (2 H,
    3 W) and (1, 1)."""

    def __init__(self, x: Tensor) -> None:
        self.steps: list[Step] = []
        self.values = [x]

    def add(self, call: object, reads: Sequence[int], value: Tensor) -> None:
        self.steps.append(Step(call, tuple(reads)))  # type: ignore[arg-type]
        self.values.append(value)

    def conv(self, g: Geometry, reads: Sequence[int], act: str) -> None:
        """With a residual where two values are read."""
        w, bias = weights(g.out_channels, g.in_channels // g.groups, *g.kernel_size), weights(g.out_channels) - 0.1
        parts: tuple[Tensor, Tensor | None, Tensor | None] = (w, None, None) if g.is_depthwise else compress(w)
        x = [self.values[v] for v in reads]
        y = F.conv2d(x[0], w, bias, g.stride, g.padding, g.dilation, g.groups)
        self.add(ConvCall(g, *parts, bias, act), reads, activate(y + x[1] if len(x) > 1 else y, act))

    def like(self, value: int) -> list[int]:
        return [v for v, x in enumerate(self.values) if x.shape == self.values[value].shape]

    def grow(self, kind: str, i: int, j: int) -> None:
        """One more step; those that fit nothing add nothing."""
        live = range(max(0, len(self.values) - 6), len(self.values))
        a, act = live[i % len(live)], ACTS[j % len(ACTS)]
        x, others = self.values[a], self.like(a)
        b, channels, one = others[j % len(others)], x.shape[1], x.shape[2:] == (1, 1)
        if kind == "conv":
            self.conv(Geometry(channels, channels, (3, 3), (1, 1), (1, 1)), [a, b][: 1 + j % 2], act)
        elif kind == "1x1" or (kind == "1x1 of one pixel" and one):
            self.conv(Geometry(channels, channels), [a, b][: 1 + j % 2], act)
        elif kind == "depthwise":
            self.conv(Geometry(channels, channels, (3, 3), (1, 1), (1, 1), groups=channels), [a, b][: 1 + j % 2], act)
        elif kind == "wide" and not one:
            self.conv(Geometry(channels, channels, (7, 9), (3, 4), (3, 4), groups=channels), [a], act)
        elif kind == "mean":
            self.add(MeanCall(), [a], x.mean((2, 3), keepdim=True))
        elif kind == "gates":
            fitting = [v for v, g in enumerate(self.values) if g.shape == (*x.shape[:2], 1, 1)]
            for gates in fitting[-1 - j % 2 :][:1]:
                self.add(ScaleCall(), [a, gates], x * self.values[gates])
        elif kind == "sum":
            self.add(MapCall(act), [a, b], activate(x + self.values[b], act))
        elif kind == "slice" and channels > 1:
            first = j % (channels - 1)
            self.add(SliceCall(first, channels - 1 - first), [a], x[:, first : channels - 1])
        elif kind == "cat" and channels < 9:
            self.add(CatCall(), [a, b, a][: 2 + j % 2], torch.cat([x, self.values[b], x][: 2 + j % 2], 1))
        elif kind == "upsampled sum" and not one and x.shape[2] < 9:
            large = F.interpolate(x, scale_factor=(2.0, 3.0), mode="bilinear", align_corners=False)
            self.add(UpsampleCall((2, 3)), [a], large)
            up = len(self.values) - 1
            other = self.like(up)[0]
            reads = [up, other] if j % 2 else [other, up]
            self.add(MapCall(act), reads, activate(large + self.values[other], act))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(1, 9), st.integers(1, 21)),
    program=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=12),
    returned=st.sets(st.integers(0, 11), min_size=1, max_size=3),
    threads=st.sampled_from([1, 2]),
)
@example((2, 4, 8, 8), [("depthwise", 0, 2), ("mean", 0, 0), ("gates", 1, 0), ("1x1", 3, 1)], {3}, 1)
@example((2, 4, 8, 8), [("slice", 0, 0), ("1x1", 1, 0), ("cat", 2, 1), ("slice", 3, 1)], {3}, 2)
def test_programs(size: tuple[int, ...], program: Programs, returned: set[int], threads: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    made = Program(x)
    for step in program:
        made.grow(*step)
    if not made.steps:
        return
    outputs = sorted({1 + number % len(made.steps) for number in returned})
    expected = [made.values[v] for v in outputs]
    with torch_threads(threads):
        for steps, numbers in ((made.steps, outputs), fuse(made.steps, 1, outputs)):
            found = Plan(steps, 1, numbers)(x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert all(y.is_contiguous() for y in found)


def kinds(steps: Sequence[Step], outputs: Sequence[int], *x: Tensor) -> list[int]:
    """Of the calls that the kernel gets."""
    fused, numbers = fuse(steps, len(x), outputs)
    return [struct.kind for struct, _ in Plan(fused, len(x), numbers).timed(*x)[1]]


def test_squeeze_and_excite_takes_no_pass_of_its_own() -> None:
    conv = ConvCall(Geometry(4, 4), *compress(weights(4, 4, 1, 1)), None, "hardsigmoid")
    deep = ConvCall(Geometry(4, 4, (3, 3), (1, 1), (1, 1), groups=4), weights(4, 1, 3, 3), None, None, None)
    steps = [Step(deep, (0,)), Step(MeanCall(), (1,)), Step(conv, (2,)), Step(ScaleCall(), (1, 3)), Step(conv, (4,))]
    x = torch.randn(2, 4, 8, 8)
    assert kinds(steps, [5], x) == [DEPTHWISE, CONVOLUTION, CONVOLUTION]
    assert kinds(steps, [4, 5], x) == [DEPTHWISE, CONVOLUTION, SCALE, CONVOLUTION]
    assert kinds([*steps, Step(MapCall(), (4, 5))], [6], x) == [DEPTHWISE, CONVOLUTION, SCALE, CONVOLUTION, MAP]


def test_slices_and_concatenations_are_no_copies() -> None:
    """Halves of a coupling: each is computed where the whole lies."""
    x = torch.randn(2, 4, 6, 6)
    conv = ConvCall(Geometry(2, 2), *compress(weights(2, 2, 1, 1)), None)
    steps = [Step(SliceCall(0, 2), (0,)), Step(SliceCall(2, 2), (0,)), Step(conv, (2, 1)), Step(conv, (3, 2))]
    plan = Plan([*steps, Step(CatCall(), (3, 4))], 1, [5])
    (y,), calls = plan.timed(x)
    assert [struct.kind for struct, _ in calls] == [CONVOLUTION, CONVOLUTION]
    first = F.conv2d(x[:, 2:], weights(2, 2, 1, 1)) + x[:, :2]
    expected = torch.cat([first, F.conv2d(first, weights(2, 2, 1, 1)) + x[:, 2:]], 1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_part_that_is_returned_or_there_twice_is_copied() -> None:
    x = torch.randn(1, 3, 4, 4)
    steps = [Step(MapCall("relu6"), (0,)), Step(CatCall(), (1, 1))]
    relu = activate(x, "relu6")
    for outputs, copies in (([2], 1), ([1, 2], 2)):
        found, calls = Plan(steps, 1, outputs).timed(x)
        assert [struct.kind for struct, _ in calls] == [MAP] + [COPY] * copies
        assert torch.equal(found[-1], torch.cat([relu, relu], 1))
        assert len(found) == 1 or torch.equal(found[0], relu)


def test_a_sum_with_something_upsampled_is_one_pass() -> None:
    x = (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 8, 10))
    for reads in ((1, 2), (2, 1)):
        steps = [Step(UpsampleCall((2, 2)), (0,)), Step(MapCall("relu6"), reads)]
        assert kinds(steps, [3], *x) == [UPSAMPLE]
        assert kinds(steps, [2, 3], *x) == [UPSAMPLE, MAP]
    assert kinds([steps[0], Step(MapCall(), (2, 2))], [3], *x) == [UPSAMPLE, MAP]
