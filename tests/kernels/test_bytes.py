"""Layers of bytes: every output equals that of whole numbers, to the last bit."""

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.deploy.runners import torch_threads
from revnets.kernels import build, byte_calls, byte_reference, plan
from revnets.kernels.build import Geometry, byte_target, kernel_problem
from revnets.kernels.byte_blocks import compress_bytes, decompress_bytes, fours, from_blocks, to_blocks
from revnets.kernels.byte_calls import (
    ByteConvCall,
    ByteDepthwiseCall,
    ByteLinearCall,
    ByteMapCall,
    ByteMaxPoolCall,
    ByteMeanCall,
    ByteScaleCall,
    Finish,
    FromBytesCall,
    ToBytesCall,
)
from revnets.kernels.byte_pairs import in_pairs

pytestmark = pytest.mark.skipif(kernel_problem() is not None, reason=f"no kernel: {kernel_problem()}")

SPARSITIES = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def pixels(generator: torch.Generator, *shape: int, extreme: bool = False) -> Tensor:
    """Random bytes in blocks of four channels, missing channels too; of the extreme ones only 0 and 255."""
    n, channels, height, width = shape
    found = torch.randint(0, 256, (n, fours(channels) // 4, height, width, 4), generator=generator, dtype=torch.uint8)
    return (found > 127).to(torch.uint8) * 255 if extreme else found


def weights(generator: torch.Generator, *shape: int, sparsity: float, extreme: bool = False) -> Tensor:
    """Random int8; most of a block of four go together, some alone."""
    found = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    found = torch.where(found > 0, 127, -128).to(torch.int8) if extreme else found
    fourth = torch.rand(shape[0], -(-shape[1] // 4), *shape[2:], generator=generator) < sparsity
    gone = fourth.repeat_interleave(4, 1)[:, : shape[1]] | (torch.rand(shape, generator=generator) < sparsity / 4)
    return found.masked_fill(gone, 0)


def finish(generator: torch.Generator, outputs: int, reach: float, kind: str) -> Finish:
    """Scales that spread a layer's sums over the bytes and beyond, so that some are saturated."""
    scale = (torch.rand(outputs, generator=generator) + 0.1) * (300.0 / max(reach, 1.0))
    zero, residual_zero = (int(n) for n in torch.randint(0, 256, (2,), generator=generator))
    limits: dict[str, Any] = {"relu": {"low": zero}, "relu6": {"low": zero, "high": max(zero, 200)}}
    more = limits.get(kind, {"to_float": kind == "float"})
    if kind == "table":
        more = {"table": torch.randint(0, 256, (256,), generator=generator, dtype=torch.uint8)}
    return Finish(scale, zero, residual_scale=0.7, residual_zero=residual_zero, **more)


FINISHES = st.sampled_from(["none", "relu", "relu6", "table", "float"])


def assert_same(found: Tensor, expected: Tensor, channels: int) -> None:
    if found.dtype is torch.uint8:
        found, expected = from_blocks(found, channels), from_blocks(expected, channels)
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected), f"{int((found != expected).sum())} of {found.numel()} differ"


def check_conv(g: Geometry, size: tuple[int, int, int], sparsity: float, kind: str, extreme: bool, seed: int) -> None:
    """One with a residual, one without."""
    generator = torch.Generator().manual_seed(seed)
    n, height, width = size
    x = pixels(generator, n, g.in_channels, height, width, extreme=extreme)
    weight = weights(
        generator, g.out_channels, g.in_channels // g.groups, *g.kernel_size, sparsity=sparsity, extreme=extreme
    )
    residual = pixels(generator, n, g.out_channels, *g.output_size(height, width))
    bias = torch.randint(-9999, 9999, (g.out_channels,), generator=generator, dtype=torch.int32)
    zero_in = int(torch.randint(0, 256, (1,), generator=generator))
    how = finish(generator, g.out_channels, float(128 * weight.double().norm()) / g.out_channels**0.5 + 500, kind)
    call = ByteConvCall(g, *compress_bytes(weight, g.groups), bias, zero_in, how)
    calls: list[Callable[..., Tensor]] = [call]
    if g.groups == g.in_channels == g.out_channels and kind != "float":
        calls.append(ByteDepthwiseCall(g, weight, bias, zero_in, how))
    for operand in (residual, None):
        expected = byte_reference.conv(x, weight, bias, g, zero_in, how, operand)
        for each in calls:
            assert_same(each(x, operand), expected, g.out_channels)


@settings(max_examples=50, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24)),
    sparsity=SPARSITIES,
    kind=FINISHES,
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pointwise(channels: Any, size: Any, sparsity: float, kind: str, extreme: bool, seed: int) -> None:
    """Any number of pixels: less than a vector, more than a block, no multiple of either; empty rows; no weights."""
    check_conv(Geometry(*channels), size, sparsity, kind, extreme, seed)


@settings(max_examples=50, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 2), st.integers(9, 40), st.integers(9, 40)),
    kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sparsity=SPARSITIES,
    kind=FINISHES,
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_convolution(
    channels: Any,
    size: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    sparsity: float,
    kind: str,
    extreme: bool,
    seed: int,
) -> None:
    inputs, outputs, groups = channels
    g = Geometry(inputs * groups, outputs * groups, kernel_size, stride, padding, dilation, groups)
    check_conv(g, size, sparsity, kind, extreme, seed)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 9),
    size=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40)),
    kernel_size=st.sampled_from([(3, 3), (5, 5), (1, 3), (7, 7), (4, 2)]),
    stride=st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 3)]),
    dilation=st.sampled_from([(1, 1), (2, 2), (1, 3)]),
    kind=st.sampled_from(["none", "relu6", "table"]),
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_depthwise(
    channels: int, size: Any, kernel_size: Any, stride: Any, dilation: Any, kind: str, extreme: bool, seed: int
) -> None:
    padding = (dilation[0] * (kernel_size[0] - 1) // 2, dilation[1] * (kernel_size[1] - 1) // 2)
    g = Geometry(channels, channels, kernel_size, stride, padding, dilation, channels)
    if min(g.output_size(*size[1:])) > 0:
        check_conv(g, size, 0.2, kind, extreme, seed)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 90), st.integers(1, 150)),
    kind=FINISHES,
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear(shape: tuple[int, int, int], kind: str, extreme: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, inputs, outputs = shape
    x, residual = pixels(generator, n, inputs, 1, 1, extreme=extreme), pixels(generator, n, outputs, 1, 1)
    weight = weights(generator, outputs, inputs, sparsity=0.5, extreme=extreme)
    bias = torch.randint(-9999, 9999, (outputs,), generator=generator, dtype=torch.int32)
    how = finish(generator, outputs, float(128 * weight.double().norm()) / outputs**0.5 + 500, kind)
    call = ByteLinearCall(weight, bias, 77, how)
    for operand in (residual, None):
        assert_same(call(x, operand), byte_reference.linear(x, weight, bias, 77, how, operand), outputs)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)),
    kind=st.sampled_from(["none", "relu", "table"]),
    seed=st.integers(0, 99),
)
def test_planes(size: tuple[int, int, int, int], kind: str, seed: int) -> None:
    """Means, sums, gates, max pools."""
    generator = torch.Generator().manual_seed(seed)
    x, other, gates = pixels(generator, *size), pixels(generator, *size), pixels(generator, *size[:2], 1, 1)
    how, channels = finish(generator, 1, 200.0, kind), size[1]
    product = finish(generator, 1, 40000.0, kind)
    assert_same(ByteMeanCall(9, how)(x), byte_reference.mean(x, 9, how), channels)
    assert_same(ByteMapCall(9, how)(x), byte_reference.add(x, 9, how), channels)
    assert_same(ByteMapCall(9, how)(x, other), byte_reference.add(x, 9, how, other), channels)
    assert_same(ByteScaleCall(9, product)(x, gates), byte_reference.scale(x, gates, 9, product), channels)
    for pool in (Geometry(channels, channels, (3, 3), (2, 2), (1, 1)), Geometry(channels, channels, (1, 1), (3, 2))):
        assert_same(ByteMaxPoolCall(pool)(x), byte_reference.max_pool(x, pool), channels)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    scale=st.sampled_from([1.0, 0.013, 1e-9, 1e6]),
    zero=st.integers(0, 255),
    seed=st.integers(0, 99),
)
def test_floats_to_bytes_and_back(size: tuple[int, int, int, int], scale: float, zero: int, seed: int) -> None:
    """What is no number, and infinity, too: the lowest, and the ends."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 99 * scale
    x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])[: x.numel()]
    found = ToBytesCall(scale, zero)(x)
    assert_same(found, byte_reference.to_bytes(x, scale, zero), size[1])
    back = FromBytesCall(size[1], scale, zero)(found)
    assert_same(back, byte_reference.from_bytes(found, size[1], scale, zero), size[1])
    ends = [255 if x.view(-1)[k] > 0 else 0 for k in range(min(3, x.numel()))]
    assert from_blocks(found, size[1]).flatten()[:3].tolist() == ends


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "size", "kernel_size"), [(512, 14, 1), (1024, 7, 1), (2051, 5, 1), (132, 9, 3)])
def test_inputs_in_chunks(inputs: int, size: int, kernel_size: int, threads: int) -> None:
    g = Geometry(inputs, 40, (kernel_size,) * 2, padding=(kernel_size // 2,) * 2)
    with torch_threads(threads):
        for sparsity in (0.0, 0.7, 0.95):
            check_conv(g, (2, size, size), sparsity, "relu", False, inputs)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_in_one_call(threads: int) -> None:
    """Floats, bytes, a sum whose summand lies in between, floats again: memory is shared by what is no longer read."""
    generator = torch.Generator().manual_seed(0)
    g = Geometry(18, 18, (3, 3), padding=(1, 1))
    layers = [weights(generator, 18, 18, 3, 3, sparsity=0.6) for _ in range(4)]
    how = [finish(generator, 18, 20000.0, "relu") for _ in layers]
    calls = [ByteConvCall(g, *compress_bytes(w), None, 3, f) for w, f in zip(layers, how, strict=True)]
    steps = [plan.Step(ToBytesCall(0.02, 3), (0,)), *(plan.Step(c, (k + 1,)) for k, c in enumerate(calls[:3]))]
    steps += [plan.Step(calls[3], (4, 2)), plan.Step(FromBytesCall(18, 0.1, 7), (5,))]
    network = plan.Plan(steps, 1, [2, 6])
    with torch_threads(threads):
        for size in (9, 14, 9):
            x = torch.randn(2, 18, size, size, generator=generator)
            values = [x, byte_reference.to_bytes(x, 0.02, 3)]
            for k, (weight, finishing) in enumerate(zip(layers, how, strict=True)):
                residual = values[2] if k == 3 else None
                values.append(byte_reference.conv(values[-1], weight, None, g, 3, finishing, residual))
            middle, found = network(x)
            assert_same(middle, values[2], 18)
            assert_same(found, byte_reference.from_bytes(values[5], 18, 0.1, 7), 18)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    sparsity=SPARSITIES,
    seed=st.integers(0, 99),
)
def test_compress_and_back(shape: tuple[int, int, int, int], sparsity: float, seed: int) -> None:
    weight = weights(torch.Generator().manual_seed(seed), *shape, sparsity=sparsity)
    values, columns, rows = compress_bytes(weight)
    assert bool((values != 0).any(1).all())
    dense = decompress_bytes(values, columns, rows, shape[1], shape[2:])
    assert torch.equal(dense[: shape[0], : shape[1]], weight)
    assert int(dense.count_nonzero()) == int(weight.count_nonzero())
    x = torch.randn(2, *shape[1:])
    assert torch.equal(from_blocks(to_blocks(x), shape[1]), x)


def test_what_does_not_fit_is_refused() -> None:
    """Before the kernel reads it."""
    generator = torch.Generator().manual_seed(0)
    g, weight = Geometry(8, 8), weights(generator, 8, 8, 1, 1, sparsity=0.5)
    values, columns, rows = compress_bytes(weight)
    how, x = Finish(torch.ones(8), 3), pixels(generator, 2, 8, 5, 5)
    wrong: list[tuple[Any, str]] = [
        ((values.float(), columns, rows, None, 0, how), "values of torch.float32"),
        ((values, columns + 2, rows, None, 0, how), "out of range"),
        ((values, columns, rows.flip(0), None, 0, how), "out of range"),
        ((values, columns[1:], rows, None, 0, how), "columns of"),
        ((values, columns, rows, torch.zeros(8), 0, how), "bias of torch.float32"),
        ((values, columns, rows, None, 256, how), "zero_in=256"),
        ((values, columns, rows, None, 0, Finish(torch.ones(4))), "scale of 4 numbers: expected 8"),
        ((values, columns, rows, None, 0, Finish(torch.full((8,), 1e9))), "is a scale wrong"),
        ((values, columns, rows, torch.full((8,), 2**31 - 1, dtype=torch.int32), 0, how), "may leave int32"),
        ((values, columns, rows, None, 0, Finish(torch.ones(8), table=torch.zeros(9).byte())), "table of 9 numbers"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            ByteConvCall(g, *arguments)
    call = ByteConvCall(g, values, columns, rows, None, 0, how)
    for operand, words in ((x.float(), "input of torch.float32"), (x[:, :1], "input of 4 channels"), (x[0], r"\(N, C")):
        with pytest.raises(ValueError, match=words):
            call(operand)
    with pytest.raises(ValueError, match="residual of shape"):
        call(x, x[:1])
    with pytest.raises(ValueError, match="reads bytes"):
        plan.Plan([plan.Step(FromBytesCall(8, 1.0, 0), (0,)), plan.Step(call, (1,))], 1, [2])
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            ToBytesCall(scale, 0)


# AVX-512 by AVX2, where there is none: byte for byte, not float for float
LIKE_512 = f"-O1 -mno-avx512f -ffp-contract=off -I{Path(__file__).with_name('avx512')}"


def test_a_copy_is_made_for_the_kernel_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled on a machine with VNNI, or without, and read on the other kind."""
    weight = weights(torch.Generator().manual_seed(0), 8, 40, 1, 1, sparsity=0.5)
    parts, how = compress_bytes(weight), Finish(torch.ones(8))
    expected = {pairs: len(in_pairs(*parts).values) if pairs else len(parts[0]) for pairs in (0, 1)}
    assert expected[0] != expected[1]
    call, library = ByteConvCall(Geometry(40, 8), *parts, None, 3, how), build.load_kernel()
    for pairs in (0, 1):
        other = SimpleNamespace(revnets_fits=library.revnets_fits, revnets_byte_pairs=lambda pairs=pairs: pairs)
        monkeypatch.setattr(byte_calls, "load_kernel", lambda other=other: other)
        call = pickle.loads(pickle.dumps(call))
        assert len(call._weights[0]) == expected[pairs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "target"),
    [
        ("-mno-avx512vnni", ""),
        ("-mno-avx512f", ""),
        ("-mno-avx", "portable"),
        ("", "portable"),
        (LIKE_512, "AVX-512"),
        (f"{LIKE_512} -DREVNETS_LIKE_VNNI", "AVX-512 VNNI"),
    ],
)
def test_other_widths(flags: str, target: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source without VNNI, for AVX2 and 128-bit vectors, and without ``-march``: as on other machines."""
    if LIKE_512 in flags and byte_target() == "portable":
        pytest.skip("no AVX2")
    attempt: tuple[list[str], list[str]] = (["-march=native", *flags.split()] if flags else [], [])
    monkeypatch.setattr(build, "_ATTEMPTS", [attempt])
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    library = build.load_kernel.__wrapped__()
    assert target in ("", library.revnets_byte_target().decode())
    for user in (plan, byte_calls):
        monkeypatch.setattr(user, "load_kernel", lambda: library)
    strided, depthwise = Geometry(6, 6, (3, 3), (2, 2), (1, 1)), Geometry(6, 6, (3, 3), padding=(1, 1), groups=6)
    wide = Geometry(9, 9, (5, 5), (2, 2), (2, 2), groups=9)
    for g in (Geometry(8, 9), Geometry(160, 9), Geometry(540, 5), strided, depthwise, wide):
        for kind in ("none", "relu6", "table", "float"):
            for extreme in (False, True):
                check_conv(g, (2, 20, 7), 0.5, kind, extreme, 1)
    test_planes.hypothesis.inner_test((2, 5, 9, 11), "none", 0)  # type: ignore[attr-defined]
    test_linear.hypothesis.inner_test((5, 30, 140), "relu", True, 0)  # type: ignore[attr-defined]
    test_floats_to_bytes_and_back.hypothesis.inner_test((2, 5, 9, 11), 0.013, 9, 0)  # type: ignore[attr-defined]
