"""Chains of layers in bands of rows: the same bits as layer by layer, in less memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revnets.deploy.runners import torch_threads
from revnets.kernels import bands
from revnets.kernels.build import Geometry
from revnets.kernels.calls import ConvCall
from revnets.kernels.compressed import compress
from revnets.kernels.plan import Plan, Step

from ..deploy.nets import pruned_weight
from .nets import needs_kernel

pytestmark = needs_kernel


def _conv(inputs: int, outputs: int, side: int = 1, stride: int = 1, groups: int = 1, more: int = 0) -> ConvCall:
    generator = torch.Generator().manual_seed(inputs + outputs + side)
    g = Geometry(inputs, outputs, (side, side), (stride, stride), (side // 2 + more, side // 2 + more), groups=groups)
    bias = torch.randn(outputs, generator=generator)
    if groups > 1:
        return ConvCall(g, torch.randn(outputs, 1, side, side, generator=generator), None, None, bias, "relu6")
    weight = pruned_weight(outputs, inputs, side, side, sparsity=0.7, seed=inputs)
    return ConvCall(g, *compress(weight), bias, "silu" if outputs % 2 else "relu")


def _chain(layers: list[tuple[int, int, int]], more: list[int] | None = None) -> list[ConvCall]:
    """A convolution, then depthwise ones of these sizes and strides, each with a pointwise one where it has a width.

    Their padding is half of their size and what ``more`` says.
    """
    calls, channels = [_conv(3, 8, 3, 2)], 8
    for (side, stride, width), padding in zip(layers, more or [0] * len(layers), strict=True):
        calls.append(_conv(channels, channels, side, stride, channels, padding))
        if width:
            calls.append(_conv(channels, width))
            channels = width
    return calls


def _plan(calls: list[ConvCall], outputs: list[int]) -> Plan:
    return Plan([Step(call, (number,)) for number, call in enumerate(calls)], 1, outputs)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.sampled_from([3, 5, 7]), st.sampled_from([1, 2]), st.sampled_from([0, 5, 12])),
        min_size=1,
        max_size=5,
    ),
    size=st.tuples(st.integers(20, 120), st.integers(16, 60)),
    more=st.lists(st.sampled_from([0, 0, 1, 3, 6]), min_size=5, max_size=5),
    band=st.integers(50, 5000),
    threads=st.sampled_from([1, 2]),
)
def test_bands_do_not_change_a_bit(
    layers: list[tuple[int, int, int]], size: tuple[int, int], more: list[int], band: int, threads: int
) -> None:
    calls = _chain(layers, more[: len(layers)])
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(band))
    (expected,) = _plan(calls, [len(calls)])(x)
    with pytest.MonkeyPatch.context() as patch, torch_threads(threads):
        patch.setattr(bands, "_LARGE", 1)
        patch.setattr(bands, "_BAND", band)
        plan = _plan(calls, [len(calls)])
        for _ in range(2):  # what is left of one run is no part of the next
            assert torch.equal(plan(x)[0], expected)


def test_bands_take_less_memory_and_count_as_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _chain([(3, 1, 16), (3, 2, 16)])
    x = torch.randn(1, 3, 200, 80)
    whole = _plan(calls, [len(calls)])
    whole(x)
    monkeypatch.setattr(bands, "_LARGE", 1)
    monkeypatch.setattr(bands, "_BAND", 4000)
    banded = _plan(calls, [len(calls)])
    assert len(banded.timed(x)[1]) == len(calls)
    banded(x)
    (one,), (many,) = ([ready for free in plan._free.values() for ready in free] for plan in (whole, banded))
    assert len(one.structs) == len(calls) < len(many.structs)
    assert many.held[0].numel() < one.held[0].numel() / 2


@pytest.mark.parametrize(("batch", "outputs"), [(2, [5]), (1, [2, 5])])
def test_batches_and_values_that_are_returned_stay_whole(
    batch: int, outputs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _chain([(3, 1, 16), (3, 2, 16)])
    x = torch.randn(batch, 3, 64, 48)
    expected = _plan(calls, outputs)(x)
    monkeypatch.setattr(bands, "_LARGE", 1)
    monkeypatch.setattr(bands, "_BAND", 2000)
    for y, same in zip(_plan(calls, outputs)(x), expected, strict=True):
        assert torch.equal(y, same)
