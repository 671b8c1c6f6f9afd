"""What stands between convolutions, computed by the kernel, against torch: any sizes, one thread and two."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.deploy.runners import torch_threads
from revnets.kernels.build import ACTIVATIONS, Geometry, kernel_problem
from revnets.kernels.calls import CatCall, ConvCall, MapCall, MaxPoolCall, MeanCall, ScaleCall, SliceCall, UpsampleCall
from revnets.kernels.compressed import activate, compress
from revnets.kernels.plan import Plan, Step

pytestmark = pytest.mark.skipif(kernel_problem() is not None, reason=f"no kernel: {kernel_problem()}")
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
THREADS = st.sampled_from([1, 2])


def images(size: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def assert_same(call: Callable[..., Tensor], expected: Tensor, *operands: Tensor, threads: int) -> None:
    with torch_threads(threads):
        y = call(*operands)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert y.is_contiguous()


@settings(max_examples=30, deadline=None)
@given(size=SIZES, threads=THREADS)
def test_mean_and_gates(size: tuple[int, ...], threads: int) -> None:
    x, gates = images(size), images((*size[:2], 1, 1), 1)
    assert_same(MeanCall(), x.mean((2, 3), keepdim=True), x, threads=threads)
    assert_same(ScaleCall(), x * gates, x, gates, threads=threads)


@settings(max_examples=40, deadline=None)
@given(size=SIZES, act=st.sampled_from(ACTIVATIONS), threads=THREADS)
def test_sums_and_activations(size: tuple[int, ...], act: str, threads: int) -> None:
    x, other = images(size), images(size, 1)
    assert_same(MapCall(act), activate(x, act), x, threads=threads)
    assert_same(MapCall(act), activate(x + other, act), x, other, threads=threads)


@settings(max_examples=30, deadline=None)
@given(size=SIZES, others=st.lists(st.integers(1, 4), max_size=3), data=st.data(), threads=THREADS)
def test_slices_and_concatenations(size: tuple[int, ...], others: list[int], data: Any, threads: int) -> None:
    n, channels, *plane = size
    parts = [images((n, number, *plane), seed) for seed, number in enumerate([channels, *others])]
    whole = torch.cat(parts, 1)
    assert_same(CatCall(), whole, *parts, threads=threads)
    first = data.draw(st.integers(0, whole.shape[1] - 1))
    count = data.draw(st.integers(1, whole.shape[1] - first))
    assert_same(SliceCall(first, count), whole[:, first : first + count], whole, threads=threads)


@settings(max_examples=40, deadline=None)
@given(size=SIZES, factors=st.tuples(st.integers(2, 9), st.integers(2, 9)), threads=THREADS)
def test_bilinear_upsampling(size: tuple[int, ...], factors: tuple[int, int], threads: int) -> None:
    x = images(size)
    out = (size[2] * factors[0], size[3] * factors[1])
    expected = F.interpolate(x, out, mode="bilinear", align_corners=False)
    assert_same(UpsampleCall(factors), expected, x, threads=threads)


@settings(max_examples=60, deadline=None)
@given(
    size=SIZES,
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    share=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bad=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
    threads=THREADS,
)
def test_max_pooling(size: Any, window: Any, stride: Any, share: Any, bad: float | None, threads: int) -> None:
    """Borders count as nothing; numbers that are none spread, as torch's do."""
    padding = (min(share[0], window[0] // 2), min(share[1], window[1] // 2))
    g = Geometry(size[1], size[1], window, stride, padding)
    assume(min(g.output_size(*size[2:])) > 0)
    x = images(size)
    if bad is not None:
        x[0, -1, size[2] // 2, size[3] // 2] = bad
    assert_same(MaxPoolCall(g), F.max_pool2d(x, window, stride, padding), x, threads=threads)


def test_a_plan_reuses_memory_and_returns_what_is_asked_for() -> None:
    """x -> mean; x * mean -> cat with x -> slice; two outputs, one of them read on."""
    steps = [Step(MeanCall(), (0,)), Step(ScaleCall(), (0, 1)), Step(CatCall(), (2, 0)), Step(SliceCall(1, 3), (3,))]
    plan = Plan(steps, 1, [2, 4])
    for seed, size in enumerate([(2, 3, 5, 7), (1, 4, 16, 16), (2, 3, 5, 7)]):
        x = images(size, seed)
        scaled = x * x.mean((2, 3), keepdim=True)
        for y, expected in zip(plan(x), [scaled, torch.cat([scaled, x], 1)[:, 1:4]], strict=True):
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_plans_are_copied_and_pickled(copied: Callable[[Plan], Plan]) -> None:
    """After a call, when they hold memory."""
    weight = torch.nn.Parameter(images((3, 9)).t()[:, :, None, None])
    conv = ConvCall(Geometry(3, 9), *compress(weight), torch.nn.Parameter(torch.randn(18))[::2])
    plan, x = Plan([Step(conv, (0,)), Step(MeanCall(), (1,))], 1, [1, 2]), images((2, 3, 5, 7))
    expected = plan(x)
    for ours, theirs in zip(copied(plan)(x), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("call", "shapes", "words"),
    [
        (ScaleCall(), [(1, 3, 4, 4), (1, 4, 1, 1)], "one per plane"),
        (MapCall(), [(1, 3, 4, 4), (1, 3, 4, 5)], "one shape"),
        (SliceCall(2, 3), [(1, 4, 2, 2)], "channels 2 to 5 of 4"),
        (CatCall(), [(1, 3, 4, 4), (1, 3, 5, 4)], "one batch size"),
    ],
)
def test_wrong_shapes(call: Callable[..., Tensor], shapes: list[tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(*(torch.zeros(shape) for shape in shapes))
