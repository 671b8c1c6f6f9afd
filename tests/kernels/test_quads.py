"""Convolutions by quads of output channels, and linear layers of images of one pixel."""

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.deploy.runners import torch_threads
from revnets.kernels import calls, quads
from revnets.kernels.build import ACTIVATIONS, LINEAR, Geometry, kernel_problem
from revnets.kernels.calls import ConvCall, LinearCall, ScaleCall, in_chunks
from revnets.kernels.compressed import activate, compress
from revnets.kernels.fuse import fuse
from revnets.kernels.plan import Plan, Step
from revnets.kernels.quads import PATTERNS, QUAD, in_quads, pay

from ..deploy.nets import pruned_weight
from .nets import needs_kernel


@pytest.fixture
def _always_by_quads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also layers of few weights, where the machine has quads."""
    monkeypatch.setattr(quads, "MIN_WEIGHTS", 0.0)


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _matrix(quads: tuple[Tensor, Tensor, Tensor, Tensor], shape: tuple[int, int], groups: int, chunk: int) -> Tensor:
    """The dense weight again, read as the kernel does."""
    values, columns, rows, counts = (part.tolist() for part in quads)
    per_group = shape[0] // groups
    matrix = torch.zeros(shape)
    per_chunk = groups * -(-per_group // QUAD)
    value = column = 0
    for number, lists in enumerate(counts):
        assert rows[number] == value
        assert rows[len(counts) + 1 + number] == column
        group, quad = divmod(number % per_chunk, per_chunk // groups)
        for pattern in range(1, PATTERNS):
            for _ in range(lists[pattern]):
                for place in range(QUAD):
                    if pattern >> place & 1:
                        output = group * per_group + quad * QUAD + place
                        assert quad * QUAD + place < per_group
                        matrix[output, number // per_chunk * chunk + columns[column]] = values[value]
                        value += 1
                column += 1
    assert [value, column] == [rows[len(counts)], rows[-1]] == [len(values), len(columns)]
    return matrix


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 30)),
    chunk=st.integers(1, 30),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_weight_is_in_one_list(
    groups: int, channels: tuple[int, int], chunk: int, sparsity: float, seed: int
) -> None:
    outputs, inputs = channels[0] * groups, channels[1]
    weight = pruned_weight(outputs, inputs, sparsity=sparsity, seed=seed)
    chunks = -(-inputs // chunk)
    parts = in_chunks(*compress(weight), chunk, chunks)
    assert torch.equal(_matrix(in_quads(*parts, groups, chunks), (outputs, inputs), groups, chunk), weight)


@needs_kernel
@pytest.mark.usefixtures("_always_by_quads")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(16, 22, 1), (300, 9, 1), (12, 15, 3)])
def test_blocks_of_any_length(sparsity: float, inputs: int, outputs: int, groups: int, threads: int) -> None:
    """Ends of a block of a few pixels, half a vector and less, more; the last quad of a group may be none."""
    weight = pruned_weight(outputs, inputs // groups, 1, 1, sparsity=sparsity, seed=outputs)
    bias = _random(outputs)
    call = ConvCall(Geometry(inputs, outputs, groups=groups), *compress(weight), bias, "relu6")
    for width in (2, 7, 8, 9, 15, 16, 17, 24, 25, 31, 33, 49, 56, 64, 90, 97, 104, 130, 196):
        x, residual = _random(2, inputs, 1, width), _random(2, outputs, 1, width)
        y = torch.full((2, outputs, 1, width), float("nan"))
        with torch_threads(threads):
            y = call(x, residual)
        expected = F.conv2d(x.double(), weight.double(), bias.double(), groups=groups) + residual.double()
        torch.testing.assert_close(y, expected.clamp(0, 6).float(), rtol=1e-5, atol=3e-5)


@needs_kernel
@pytest.mark.usefixtures("_always_by_quads")
def test_pixels_do_not_depend_on_their_neighbours() -> None:
    """Sums have one order, however many pixels there are beside them."""
    weight = pruned_weight(10, 200, 1, 1, sparsity=0.6, seed=0)
    call, x = ConvCall(Geometry(200, 10), *compress(weight), None), _random(1, 200, 1, 150)
    whole = call(x)
    for width in (3, 8, 20, 50, 120):
        assert torch.equal(call(x[..., :width].contiguous()), whole[..., :width])


@needs_kernel
@pytest.mark.skipif(kernel_problem() is not None or not pay(99), reason="no quads on this machine")
@pytest.mark.usefixtures("_always_by_quads")
def test_a_number_that_is_none_stays_with_its_inputs() -> None:
    weight = torch.tensor([[1.0, 0, 0], [1.0, 1, 0], [0, 1, 0], [0, 0, 1.0], [1.0, 1, 1]])
    x = _random(1, 3, 4, 5)
    x[0, 1, 2, 3] = float("nan")
    y = ConvCall(Geometry(3, 5), *compress(weight[:, :, None, None]), None)(x)
    assert y[0, :, 2, 3].isnan().tolist() == [False, True, True, False, True]
    assert int(y.isnan().sum()) == 3


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 90), st.integers(1, 70)),
    sparsity=st.sampled_from([0.0, 0.6]),
    act=st.sampled_from(ACTIVATIONS),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    threads=st.sampled_from([1, 2]),
)
def test_images_of_one_pixel(size: Any, sparsity: float, act: str, extras: Any, threads: int) -> None:
    n, inputs, outputs = size
    weight = pruned_weight(outputs, inputs, sparsity=sparsity, seed=inputs)
    x, gates, residual, bias = _random(n, inputs), _random(n, inputs, seed=1), _random(n, outputs), _random(outputs)
    call = ConvCall(Geometry(inputs, outputs), *compress(weight[:, :, None, None]), bias if extras[0] else None, act)
    steps = [Step(ScaleCall(), (0, 1)), Step(call, (3, 2) if extras[1] else (3,))]
    if not extras[2]:
        steps = [Step(call, (0, 2) if extras[1] else (0,))]
    plan = Plan(*fuse(steps, 3, [2 + len(steps)])[:1], 3, [3])
    given = [t[:, :, None, None] for t in (x, gates, residual)]
    with torch_threads(threads):
        (y,) = plan(*given)
    expected = F.linear((x * gates if extras[2] else x).double(), weight.double(), bias.double() if extras[0] else None)
    expected = activate(expected + residual if extras[1] else expected, act)
    torch.testing.assert_close(y[:, :, 0, 0], expected.float(), rtol=1e-5, atol=3e-5)


@needs_kernel
def test_linear_layers_read_dense_weights() -> None:
    weight, bias, x = _random(33, 50), _random(33), _random(2, 50, 1, 1)
    y = LinearCall(weight, bias)(x)
    torch.testing.assert_close(y[:, :, 0, 0], F.linear(x[:, :, 0, 0], weight, bias))
    with pytest.raises(ValueError, match=r"expected \(N, 50, 1, 1\)"):
        LinearCall(weight, None)(_random(2, 50, 2, 1))
    with pytest.raises(ValueError, match=r"expected \(outputs, inputs\)"):
        LinearCall(weight[0], None)
    (part,), _ = ConvCall(Geometry(50, 33), *compress(weight[:, :, None, None]), bias).parts([(2, 50, 1, 1)])
    assert part.struct.kind == LINEAR


@needs_kernel
@pytest.mark.parametrize("pixels", [1, 9])
def test_weights_are_sorted_for_layers_that_are_called_again_alone(
    monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    """An operator makes its layer at each call: sorting its weights takes longer than it saves."""
    weight, x = pruned_weight(16, 64, 1, 1, sparsity=0.5), _random(1, 64, pixels, 1)
    parts = compress(weight)
    made = ConvCall(Geometry(64, 16), *parts, None)
    before = len(pickle.dumps(made))
    expected = made(x)
    assert len(pickle.dumps(made)) == before  # what is made for images of a size is of this process
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), expected)
    for name in ("in_quads", "_dense"):
        monkeypatch.setattr(calls, name, None)
    assert torch.allclose(torch.ops.revnets.sparse_conv2d(x, *parts, None, None, *_PLAIN), expected, atol=1e-5)
    tokens = _random(2, 64)
    found = torch.ops.revnets.sparse_linear(tokens, *parts, None)
    assert torch.allclose(found, F.linear(tokens, weight.flatten(1)), atol=1e-5)


_PLAIN = ([1, 1], [1, 1], [0, 0], [1, 1], 1, "none")


@needs_kernel
def test_an_input_comes_once_in_a_row() -> None:
    values, columns, rows = compress(pruned_weight(4, 32, 1, 1, sparsity=0.2))
    columns[1] = columns[0]
    with pytest.raises(ValueError, match="each once and in order"):
        ConvCall(Geometry(32, 4), values, columns, rows, None)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3])
def test_layers_take_the_time_of_those_who_compute_them(threads: int) -> None:
    layer = ConvCall(Geometry(64, 64), *compress(pruned_weight(64, 64, 1, 1, sparsity=0.2)), None)
    x = _random(1, 64, 28, 28)
    with torch_threads(threads):
        taken = [seconds for _ in range(20) for _, seconds in layer.plan(1, times=6).timed(x)[1]]
    assert min(taken) > 1e-6  # a thread that comes late would find nothing to do
