"""The kernel against torch's dense convolutions; how it is built, and what happens where it cannot be."""

import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.deploy.runners import torch_threads
from revnets.kernels import build, compressed, plan, quads
from revnets.kernels.build import ACTIVATIONS, Geometry, KernelUnavailable, kernel_problem
from revnets.kernels.calls import ConvCall, MapCall, MaxPoolCall, MeanCall, ScaleCall
from revnets.kernels.compressed import activate, compress, decompress

from ..deploy.nets import pruned_weight

needs_kernel = pytest.mark.skipif(kernel_problem() is not None, reason=f"no kernel: {kernel_problem()}")


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, g: Geometry, act: str) -> Tensor:
    """In float64."""
    bias = None if bias is None else bias.double()
    y = F.conv2d(x.double(), weight.double(), bias, g.stride, g.padding, g.dilation, g.groups)
    return activate(y if residual is None else y + residual.double(), act)


def assert_close(y: Tensor, expected: Tensor) -> None:
    assert y.shape == expected.shape
    assert y.is_contiguous()
    assert float((y - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))


def operands(g: Geometry, n: int, h: int, w: int, sparsity: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, g.in_channels, h, w, generator=generator)
    weight = pruned_weight(g.out_channels, g.in_channels // g.groups, *g.kernel_size, sparsity=sparsity, seed=seed)
    h_out, w_out = g.output_size(h, w)
    residual = torch.randn(n, g.out_channels, h_out, w_out, generator=generator)
    return x, weight, torch.randn(g.out_channels, generator=generator), residual


SPARSITIES = st.sampled_from([0.0, 0.5, 0.9, 1.0])


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24)),
    sparsity=SPARSITIES,
    act=st.sampled_from(ACTIVATIONS),
    extras=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_pointwise(channels: Any, size: Any, sparsity: float, act: str, extras: Any, seed: int) -> None:
    """Any number of pixels: less than a vector, more than a block, no multiple of either; empty rows; no weights."""
    g = Geometry(*channels)
    x, weight, bias, residual = operands(g, *size, sparsity, seed)
    b, r = (t if use else None for t, use in zip((bias, residual), extras, strict=True))
    y = ConvCall(g, *compress(weight), b, act)(x, r)
    assert_close(y, reference(x, weight, b, r, g, act))


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 2), st.integers(9, 40), st.integers(9, 40)),
    kernel_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sparsity=SPARSITIES,
    act=st.sampled_from(["none", "relu", "silu"]),
    use_residual=st.booleans(),
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
    act: str,
    use_residual: bool,
    seed: int,
) -> None:
    inputs, outputs, groups = channels
    g = Geometry(inputs * groups, outputs * groups, kernel_size, stride, padding, dilation, groups)
    x, weight, bias, residual = operands(g, *size, sparsity, seed)
    r = residual if use_residual else None
    assert_close(ConvCall(g, *compress(weight), bias, act)(x, r), reference(x, weight, bias, r, g, act))


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40)),
    channels=st.integers(1, 6),
    side=st.sampled_from([1, 2, 3, 4, 5, 7, 9, 15]),
    stride=st.sampled_from([1, 2, 3, 4, 8, 11, 12, 21]),
    act=st.sampled_from(ACTIVATIONS),
    use_residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_depthwise(size: Any, channels: int, side: int, stride: int, act: str, use_residual: bool, seed: int) -> None:
    g = Geometry(channels, channels, (side, side), (stride, stride), (side // 2, side // 2), groups=channels)
    assert g.is_depthwise
    assume(min(g.output_size(*size[1:])) > 0)
    x, weight, bias, residual = operands(g, *size, 0.0, seed)
    r = residual if use_residual else None
    assert_close(ConvCall(g, weight, None, None, bias, act)(x, r), reference(x, weight, bias, r, g, act))


@needs_kernel
@pytest.mark.parametrize("side", [14, 32])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_threads_do_not_change_the_result(side: int, batch: int, sparsity: float) -> None:
    """Neither those of OpenMP nor those of Python; few pixels are shared out by output channels."""
    g = Geometry(32, 48)
    x, weight, bias, residual = operands(g, batch, side, side, sparsity, 0)
    call = ConvCall(g, *compress(weight), bias, "hardswish")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(x, residual)
        torch.set_num_threads(4)
        assert torch.equal(call(x, residual), expected)
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: call(x, residual), range(16)):
            assert torch.equal(y, expected)


@needs_kernel
def test_nan_and_infinity_pass_through() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, :, None, None]
    x = torch.ones(1, 2, 4, 8)
    x[0, 0, 0, 0], x[0, 0, 1, 3] = float("nan"), float("inf")
    y = ConvCall(Geometry(2, 2), *compress(weight), None, "relu")(x)
    assert bool(y[0, 0, 0, 0].isnan())
    assert bool(y[0, 0, 1, 3].isinf())
    assert torch.equal(y[0, 1], torch.ones(4, 8))


@needs_kernel
def test_strided_inputs_and_empty_batches() -> None:
    g = Geometry(4, 4)
    x, weight, bias, _ = operands(g, 2, 8, 8, 0.5, 0)
    call = ConvCall(g, *compress(weight), bias)
    assert_close(call(x.to(memory_format=torch.channels_last)), reference(x, weight, bias, None, g, "none"))
    assert call(x[:0]).shape == (0, 4, 8, 8)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_inputs_of_other_types(dtype: torch.dtype) -> None:
    """Refused, but for what autocast makes of layers before."""
    g = Geometry(4, 4)
    x, weight, bias, residual = operands(g, 2, 8, 8, 0.5, 0)
    call = ConvCall(g, *compress(weight), bias)
    for name, pair in (("input", (x.to(dtype), residual)), ("residual", (x, residual.to(dtype)))):
        with pytest.raises(ValueError, match=rf"^{name} of {dtype} on cpu: expected torch.float32 .* \.float\(\)"):
            call(*pair)
    with pytest.raises(ValueError, match=rf"^gates of {dtype} on cpu"):
        ScaleCall()(x, torch.ones(2, 4, 1, 1).to(dtype))
    with pytest.raises(ValueError, match=rf"^residual of {dtype} on cpu"):
        pickle.loads(pickle.dumps(MapCall().plan(2)))(x, residual.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if dtype.is_floating_point:
            x = x.to(dtype)
            assert_close(call(x, residual), reference(x, weight, bias, residual, g, "none"))
        else:
            with pytest.raises(ValueError, match=r"input of torch.int64"):
                call(x.to(dtype))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 1, 1), (2, 1, 8, 8), (8, 8)])
@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])
def test_residuals_are_not_broadcast(shape: tuple[int, ...], kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel and without it alike."""
    if not kernel:
        monkeypatch.setattr(compressed, "kernel_problem", lambda: "there is none")
        monkeypatch.setattr(compressed, "warn_of_dense_path", lambda: None)
    x, weight, bias, _ = operands(Geometry(4, 4), 2, 8, 8, 0.5, 0)
    weights, numbers = compress(weight), ([1, 1], [1, 1], [0, 0], [1, 1], 1, "none")
    with pytest.raises(ValueError, match=r"^residual of shape"):
        torch.ops.revnets.sparse_conv2d(x, *weights, bias, torch.ones(shape), *numbers)


@needs_kernel
@pytest.mark.parametrize("size", [1, 2])
def test_images_that_are_too_small(size: int) -> None:
    """Two negative sizes would make a positive number of pixels."""
    weight = torch.ones(2, 2, 3, 3)
    for call in (ConvCall(Geometry(2, 2, (3, 3)), *compress(weight), None), MaxPoolCall(Geometry(2, 2, (3, 3)))):
        layers = [plan.Step(call, (0,)), plan.Step(MeanCall(), (1,))]
        with pytest.raises(ValueError, match=rf"shape \(1, 2, {size}, {size}\): too small"):
            plan.Plan(layers, 1, [2])(torch.zeros(1, 2, size, size))
        with pytest.raises(ValueError, match=r"H and W at least 1"):
            call(torch.zeros(1, 2, 0, 4))
        with pytest.raises(ValueError, match=r"expected \(N, C, H, W\)"):
            call(torch.zeros(2, 4, 4))


@needs_kernel
def test_all_outputs_are_computed() -> None:
    """The first may be of an empty batch."""
    network = plan.Plan([plan.Step(MeanCall(), (0,)), plan.Step(MeanCall(), (1,))], 2, [2, 3])
    empty, means = network(torch.zeros(0, 3, 4, 4), torch.ones(2, 3, 4, 4))
    assert empty.shape == (0, 3, 1, 1)
    assert torch.equal(means, torch.ones(2, 3, 1, 1))


@needs_kernel
def test_weights_that_do_not_fit() -> None:
    """The operators are public: what they are given is checked before the kernel reads it."""
    op, linear = torch.ops.revnets.sparse_conv2d, torch.ops.revnets.sparse_linear
    x, weight, bias, residual = operands(Geometry(6, 8), 2, 5, 5, 0.5, 0)
    values, columns, rows = compress(weight)
    numbers: Any = ([1, 1], [1, 1], [0, 0], [1, 1], 1, "none")
    wrong: list[tuple[Any, str]] = [
        ((x, values.double(), columns, rows, None, None), "values of torch.float64"),
        ((x, values, columns.long(), rows, None, None), "columns of torch.int64"),
        ((x, values, columns, rows.long(), None, None), "rows of torch.int64"),
        ((x, values, columns, rows, bias.half(), None), "bias of torch.float16"),
        ((x, values, columns, rows, bias[:3], None), "bias of 3 numbers: expected 8"),
        ((x, values, columns[1:], rows, bias, None), "columns of"),
        ((x, values[1:], columns[1:], rows, bias, None), "out of range"),
        ((x, values, columns, rows.flip(0), bias, None), "out of range"),
        ((x, values, columns - 1, rows, bias, None), "out of range"),
        ((x[:, :5], values, columns, rows, bias, None), "columns from 0 to 4"),
        ((x, values, columns, rows, bias, residual[:1, :1, :1, :1]), r"residual of shape \(1, 1, 1, 1\)"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            op(*arguments, *numbers)
    with pytest.raises(ValueError, match="columns from 0 to 4"):
        linear(torch.zeros(3, 5), values, columns, rows, None)
    with pytest.raises(ValueError, match="4 groups of 6 inputs"):
        op(x, values, columns, rows, bias, None, *numbers[:4], 4, "none")
    with pytest.raises(ValueError, match="values of 32 numbers: expected 48"):
        ConvCall(Geometry(3, 3, (4, 4), groups=3), torch.zeros(2, 1, 4, 4), None, None, None)
    assert torch.equal(op(x[:, :0], values[:0], columns[:0], rows * 0, bias, None, *numbers)[0, :, 0, 0], bias)


@needs_kernel
def test_another_default_device() -> None:
    g = Geometry(200, 8)
    x, weight, bias, residual = operands(g, 2, 5, 5, 0.5, 0)
    with torch.device("meta"):
        parts = compress(weight)
        y = ConvCall(g, *parts, bias)(x, residual)
        again = decompress(*parts, weight.shape)
    assert_close(y, reference(x, weight, bias, residual, g, "none"))
    assert torch.equal(again, weight)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4), sparsity=SPARSITIES, seed=st.integers(0, 99))
def test_compress_and_back(shape: list[int], sparsity: float, seed: int) -> None:
    weight = pruned_weight(*shape, sparsity=sparsity, seed=seed)
    values, columns, rows = compress(weight)
    assert len(values) == int(weight.count_nonzero()) == int(rows[-1])
    assert torch.equal(decompress(values, columns, rows, shape), weight)


def test_rows_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 32768 per output channel"):
        compress(torch.ones(1, 32769))


# --- the build -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_operators_are_dense_and_say_so() -> None:
    g = Geometry(6, 8, (3, 3), (2, 2), (1, 1))
    x, weight, bias, residual = operands(g, 2, 9, 9, 0.7, 0)
    with pytest.warns(UserWarning, match=r"dense kernels.*REVNETS_CXX=none"):
        y = torch.ops.revnets.sparse_conv2d(
            x, *compress(weight), bias, residual, [3, 3], [2, 2], [1, 1], [1, 1], 1, "relu"
        )
    assert_close(y, reference(x, weight, bias, residual, g, "relu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torch.ops.revnets.sparse_linear(x.mean((2, 3)), *compress(weight[:, :, 0, 0]), bias)
        depthwise = torch.ops.revnets.depthwise_conv2d(x, weight[:6, :1], None, None, [1, 1], [1, 1], "none")
    torch.testing.assert_close(y, F.linear(x.mean((2, 3)), weight[:, :, 0, 0], bias))
    torch.testing.assert_close(depthwise, F.conv2d(x, weight[:6, :1], padding=1, groups=6))


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("none", "REVNETS_CXX=none"), ("no-such-compiler", "no C.. compiler found"), ("false", "cannot compile")],
)
def test_reasons(compiler: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(build.COMPILER_VARIABLE, compiler)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(KernelUnavailable, match=message):
        build.load_kernel.__wrapped__()
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_more_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``REVNETS_CXXFLAGS`` reaches the compiler and the linker, after the library's own flags."""
    log = tmp_path / "log"
    (tmp_path / "compiler").write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv(build.COMPILER_VARIABLE, str(tmp_path / "compiler"))
    monkeypatch.setenv(build.FLAGS_VARIABLE, "-O1 '-DA=b c'")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(KernelUnavailable):  # this compiler writes nothing
        build.load_kernel.__wrapped__()
    compiling, linking = log.read_text().splitlines()[:2]
    assert compiling.index("-O3") < compiling.index("-O1 -DA=b c")
    assert linking.endswith("-O1 -DA=b c")


@needs_kernel
def test_a_damaged_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernel.so").write_text("no library")
    with pytest.raises(KernelUnavailable):
        build._checked(tmp_path / "kernel.so")


@pytest.mark.slow
@needs_kernel
def test_processes_share_one_build(tmp_path: Path) -> None:
    code = "from revnets.kernels.build import load_kernel; load_kernel()"
    environment = {**os.environ, build.CACHE_VARIABLE: str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.so"))) == 1


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx", ""])
def test_other_vector_widths(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source for AVX2 and 128-bit vectors, and without ``-march``: as on other machines."""
    attempt = (["-march=native", *flags.split()] if flags else [], [])
    monkeypatch.setattr(build, "_ATTEMPTS", [attempt])
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    library = build.load_kernel.__wrapped__()
    for module in (plan, quads):
        monkeypatch.setattr(module, "load_kernel", lambda: library)
    for g in (Geometry(8, 9), Geometry(4, 6, (3, 3), (2, 2), (1, 1)), Geometry(6, 6, (3, 3), (1, 1), (1, 1), groups=6)):
        for size in (3, 7, 20):
            x, weight, bias, residual = operands(g, 2, size, size, 0.5, size)
            for act in ACTIVATIONS:
                expected = reference(x, weight, bias, residual, g, act)
                assert_close(ConvCall(g, *compress(weight), bias, act)(x, residual), expected)
                if g.is_depthwise:
                    assert_close(ConvCall(g, weight, None, None, bias, act)(x, residual), expected)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "size", "kernel_size"), [(300, 14, 1), (1024, 7, 1), (513, 5, 1), (64, 9, 3)])
def test_inputs_in_chunks(inputs: int, size: int, kernel_size: int, threads: int) -> None:
    g = Geometry(inputs, 40, (kernel_size,) * 2, padding=(kernel_size // 2,) * 2)
    with torch_threads(threads):
        for sparsity in (0.0, 0.7, 0.95):
            x, weight, bias, residual = operands(g, 2, size, size, sparsity, seed=inputs)
            y = ConvCall(g, *compress(weight), bias, "relu")(x, residual)
            assert_close(y, reference(x, weight, bias, residual, g, "relu"))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
def test_layers_in_one_call_share_memory(threads: int) -> None:
    g = Geometry(24, 24)
    weights = [pruned_weight(24, 24, 1, 1, sparsity=0.8, seed=seed) for seed in range(5)]
    calls = [ConvCall(g, *compress(weight), None, "relu") for weight in weights]
    # values: 0 is the input, k the output of layer k; layer 4 adds what layer 1 gave, which must still be there
    steps = [plan.Step(call, (k, 1) if k == 3 else (k,)) for k, call in enumerate(calls)]
    network = plan.Plan(steps, 1, [2, 5])
    with torch_threads(threads):
        for seed, size in enumerate((9, 14, 9)):
            values = [torch.randn(2, 24, size, size, generator=torch.Generator().manual_seed(seed))]
            for k, weight in enumerate(weights):
                residual = values[1] if k == 3 else None
                values.append(reference(values[-1].float(), weight, None, residual, g, "relu"))
            for y, expected in zip(network(values[0]), (values[2], values[5]), strict=True):
                assert_close(y, expected)


@needs_kernel
@pytest.mark.parametrize("length", [3, 5, 8])
def test_a_layer_never_writes_over_what_it_reads(length: int) -> None:
    """Only what no later step reads, nor this one: a convolution reads its neighbours after it has written."""
    widths = [8, 24, 16, 40, 8, 32, 16, 24, 8]
    values = [torch.randn(2, widths[0], 13, 11, generator=torch.Generator().manual_seed(0))]
    steps = []
    for k in range(length):
        weight = pruned_weight(widths[k + 1], widths[k], 3, 3, sparsity=0.7, seed=k) / 8
        g = Geometry(widths[k], widths[k + 1], (3, 3), padding=(1, 1))
        steps.append(plan.Step(ConvCall(g, *compress(weight), None, "relu"), (k,)))
        values.append(reference(values[-1].float(), weight, None, None, g, "relu"))
    (found,) = plan.Plan(steps, 1, [length])(values[0])
    assert_close(found, values[-1])
