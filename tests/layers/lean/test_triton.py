"""The Triton kernels against torch's own in a row, in Triton's interpreter: values, gradients, the same bits again."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = [(2, 5, 6, 7), (1, 33, 4, 4), (3, 16, 1, 1), (2, 3, 1, 9), (2, 34, 9, 8)]
ACTS = ("", "relu", "silu", "hardswish")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def maps(shape: tuple[int, ...], dtype: torch.dtype, layout: str, count: int) -> list[Tensor]:
    """Contiguous, channels-last, or one half of the channels of a larger map."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, c, h, w = shape
    made = [torch.randn(n, 2 * c, h, w, generator=generator).mul(2).add(0.3).to(dtype) for _ in range(count)]
    if layout == "half":
        return [t[:, c:] for t in made]
    kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return [t[:, :c].contiguous(memory_format=kind) for t in made]


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """``got`` in this precision against what float32 gives: torch's own in 16 bits rounds after every step."""
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    scale = max(float(wanted.abs().max()), 1e-3 if dtype == torch.float32 else 0.1)  # sums of either sign cancel
    assert float((got.float() - wanted.float()).abs().max()) <= TOLERANCE[dtype] * scale, (dtype, got, wanted)


def layers_of(c: int, dtype: torch.dtype, bias: bool = True) -> tuple[object, ...]:
    """Squeeze-and-excite's weights, biases and activations."""
    generator = torch.Generator().manual_seed(c)
    r = max(1, c // 3)
    w1, b1, w2, b2 = (torch.randn(s, generator=generator).to(dtype) for s in ((r, c, 1, 1), (r,), (c, r, 1, 1), (c,)))
    return w1, b1 if bias else None, w2, b2 if bias else None, "hardswish", "hardsigmoid"


class Sizes(NamedTuple):
    """From which size on several programs share a channel's rows, or a sample."""

    small: int
    sample: int


ALL_SMALL, ALL_LARGE = Sizes(2**20, 2**20), Sizes(0, 0)


def check(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, act: str, sizes: Sizes, autocast: bool = False
) -> None:
    """Every operator of ``cuda`` on CPU tensors, interpreted, against the one of ``ops`` in float32.

    As under autocast the weights of squeeze-and-excite may be in float32; then they are without biases, too.
    """
    from revnets.layers.lean import cuda, ops

    def in_float32(name: str, *arguments: Any) -> Any:
        widened = (a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
        return getattr(ops, name)(*widened)

    cuda.SMALL_ROWS, cuda.SAMPLE_NUMBERS = sizes
    generator = torch.Generator().manual_seed(1)
    c = shape[1]
    x, grad = maps(shape, dtype, layout, 2)
    weight, bias_ = torch.randn(c, generator=generator), torch.randn(c, generator=generator)
    weights = torch.float32 if autocast else dtype
    layers = layers_of(c, weights, bias=not autocast)

    def running() -> tuple[object, ...]:
        return torch.full((c,), 0.5), torch.full((c,), 2.0), torch.tensor(3), 0.1

    batch, mine = (x, weight, bias_, 1e-5, act), running()
    h, mean, var = cuda.batch_norm_act_(*batch, *mine)
    theirs = running()
    for got, want in zip((h, mean, var), in_float32("batch_norm_act_", *batch, *theirs), strict=True):
        close(got, want, dtype if got is h else torch.float32)
    for got, want in zip(mine[:2], theirs[:2], strict=True):
        close(got, want, torch.float32)  # type: ignore[arg-type]
    assert mine[2] == theirs[2] == 4

    norm = (x, weight, bias_, mean, var, 1e-5, act)
    assert torch.equal(cuda.norm_act(*norm), h), "the recomputation has other bits than the forward pass"
    p, *kept = cuda.batch_norm_act_se_(*batch, *(mine := running()), *layers)
    wanted = in_float32("batch_norm_act_se_", *batch, *(theirs := running()), *layers)
    for got, want in zip((p, *kept), wanted, strict=True):
        close(got, want, torch.float32 if got.dim() == 1 else dtype)
    close(mine[1], theirs[1], torch.float32)  # type: ignore[arg-type]
    assert mine[2] == 4
    pooled, gate = kept[2:]
    norm = (x, weight, bias_, *kept[:2], 1e-5, act)
    assert torch.equal(cuda.norm_act_gated(*norm, gate), p), "the recomputation has other bits than the forward pass"
    nothing, read = cuda.norm_act_again(*norm, gate)
    assert nothing.numel() == 0
    assert torch.equal(read, p), "the weight's gradient would be that of another input"

    y, _ = in_float32("norm_act_again", *norm, gate)
    for needed in ((True, True, True), (False, True, True)):
        got, want = cuda.norm_act_backward(grad, *norm, needed), in_float32("norm_act_backward", grad, *norm, needed)
        if needed[0]:
            close(got.pop(0), want.pop(0), dtype)
        for one, other in zip(got, want, strict=True):
            close(one, other, torch.float32)
        for name, more in (("norm_act_backward_", (y,)), ("norm_act_se_backward_", (y, gate, pooled, *layers))):
            one, other = grad.clone(), grad.float().clone()
            got = getattr(cuda, name)(one, *norm, *more, needed)
            want = in_float32(name, other, *norm, *more, needed)
            few = len(got) - 2  # of squeeze-and-excite
            if len(want) == few + sum(needed) and needed[0]:
                other = want.pop(few)
            for i, pair in enumerate(zip(got, want, strict=True)):
                close(*pair, weights if i < few else torch.float32)
            if needed[0]:
                close(one, other, dtype)
    again = cuda.norm_act_se_backward_(grad.clone(), *norm, *more, needed)
    assert all(map(torch.equal, got, again)), "the same sums twice have other bits"


def check_sizes_agree() -> None:
    """By one program per channel or several, by one program per sample or several: the same to rounding."""
    from revnets.layers.lean import cuda

    found = []
    for cuda.SMALL_ROWS, cuda.SAMPLE_NUMBERS in (ALL_SMALL, ALL_LARGE):
        x, grad = maps((3, 20, 14, 15), torch.float32, "channels_last", 2)
        one, running = torch.ones(20), (torch.zeros(20), torch.ones(20), torch.tensor(0), 0.1)
        p, mean, var, pooled, gate = cuda.batch_norm_act_se_(
            x, one, one, 1e-5, "silu", *running, *layers_of(20, torch.float32)
        )
        norm = (x, one, one, mean, var, 1e-5, "silu")
        more = (x[:0], gate, pooled, *layers_of(20, torch.float32))
        found.append([p, mean, var, pooled, gate, *cuda.norm_act_se_backward_(grad, *norm, *more, (True,) * 3), grad])
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= 2e-6 * float(a.abs().max())


def check_far_from_zero() -> None:
    """The variance is of what is left of the mean, not a difference of two large numbers."""
    from revnets.layers.lean import cuda

    x = torch.randn(4, 3, 40, 9, generator=torch.Generator().manual_seed(0)) + 1000
    for cuda.SMALL_ROWS in (0, 2**20):
        _, mean, var = cuda.batch_norm_act_(
            x, *(torch.ones(3),) * 2, 1e-5, "", torch.zeros(3), torch.ones(3), torch.tensor(0), 0.1
        )
        exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        assert float((var - exact_var).abs().max()) < 1e-4
        assert float((mean - exact_mean).abs().max()) < 1e-3


def check_network() -> None:
    """A network on these kernels: the three modes agree to the bit, and with torch's own kernels nearly."""
    import revnets
    from revnets.layers import MBConv
    from revnets.layers.lean import cuda
    from revnets.reversible import AdditiveCoupling, RevSequential
    from revnets.reversible.operators import calls

    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)

    def step(mode: str) -> list[Tensor]:
        torch.manual_seed(0)
        f, g = MBConv(4, 4, exp_ratio=2, se_ratio=0.5), MBConv(4, 4, se_ratio=0.5)
        net = RevSequential([AdditiveCoupling(f, g)], exact=True).to(memory_format=torch.channels_last)
        revnets.set_mode(net, mode)
        given = x.clone().requires_grad_()
        (net(given)[0] ** 2).sum().backward()
        return [given.grad, *(p.grad for p in net.parameters()), *net.buffers()]  # type: ignore[list-item]

    torchs = step("store")
    ours = [name for name in vars(cuda) if hasattr(calls, name) and name != "__doc__"]
    assert "norm_act_se_backward_" in ours
    for name in ours:
        setattr(calls, name, getattr(cuda, name))
    stored, rebuilt, checkpointed = (step(mode) for mode in ("store", "reversible", "checkpoint"))
    for a, b, c, d in zip(torchs, stored, rebuilt, checkpointed, strict=True):
        assert torch.equal(b, c)
        assert torch.equal(b, d)
        assert float((a - b).abs().max()) <= 1e-2 * max(1.0, float(a.abs().max()))  # one step of the grid is 2^-12


def check_some() -> None:
    """Every shape, layout, precision and activation once or twice, not all their combinations."""
    layouts, kinds = ("contiguous", "channels_last", "half"), list(TOLERANCE)
    for i, shape in enumerate([*SHAPES, SHAPES[0]]):
        sizes = ALL_LARGE if i % 2 else ALL_SMALL
        check(shape, kinds[i // 2], layouts[(i + 1) % 3], ACTS[i % len(ACTS)], sizes, autocast=i == 3)


def check_all() -> None:
    for shape in SHAPES:
        for dtype in TOLERANCE:
            for layout in ("contiguous", "channels_last", "half"):
                for act in ACTS if dtype == torch.float32 else ("hardswish",):
                    for sizes in (ALL_SMALL, ALL_LARGE):
                        check(shape, dtype, layout, act, sizes)


def check_not_finite() -> None:
    """What is not a number stays so: guards look for it."""
    from revnets.layers.lean import cuda

    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 1] = torch.nan
    one = torch.ones(2)
    for act in ACTS:
        y = cuda.norm_act(x, one, one, one * 0, one, 1e-5, act)
        assert y[0, 0].isnan().sum() == 1
        assert y[0, 1].isfinite().all()


def quick() -> None:
    """Calls within a kernel as Python's own: the interpreter prepares Triton's language anew for each of them."""
    from triton.runtime.interpreter import InterpretedFunction

    prepared = InterpretedFunction.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if not self.fn.__module__.startswith("revnets"):  # Triton's own ask for more
            return prepared(self, *arguments, **options)
        return getattr(self, "rewrite", lambda: self.fn)()(*arguments, **options)

    InterpretedFunction.__call__ = call


CHECKS = ["check_some", "check_network", "check_sizes_agree", "check_far_from_zero", "check_not_finite"]


@pytest.mark.parametrize("what", [*CHECKS, pytest.param("check_all", marks=pytest.mark.slow)])
def test_interpreted(what: str) -> None:
    code = f"from tests.layers.lean.test_triton import quick, {what}; quick(); {what}()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
