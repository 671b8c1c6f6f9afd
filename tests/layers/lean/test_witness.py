"""Numbers that are remembered of dropped tensors: what is the same passes, what is not does not."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revnets.layers.lean.witness import PLACES, TOLERANCE, ComputedOtherwise, Witness

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).filter(lambda s: torch.Size(s).numel() >= 2 * PLACES)


def witness(x: Tensor) -> Witness:
    found = Witness.of(x)
    assert found is not None
    return found


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, dtype=st.sampled_from(sorted(TOLERANCE, key=str)), seed=st.integers(0, 9))
def test_the_same_passes_and_another_does_not(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    held = witness(x)
    held.check(x.clone())
    held.check(x * (1 + TOLERANCE[dtype] / 8))
    for other in (2 * x, x + 1, torch.full_like(x, float("nan")), torch.full_like(x, float("inf"))):
        with pytest.raises(ComputedOtherwise):
            held.check(other)


def test_not_finite_numbers_are_numbers() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).repeat(64)
    held = witness(x)
    held.check(x.clone())
    with pytest.raises(ComputedOtherwise):
        held.check(x.nan_to_num(0))
    with pytest.raises(ComputedOtherwise):
        held.check(torch.where(x.isinf(), -x, x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_and_steps_are_all_seen(layout: torch.memory_format) -> None:
    """One channel of sixteen that was written to is seen in nearly each step, one pixel in some."""
    x = torch.randn(2, 16, 8, 8).to(memory_format=layout)
    one_channel, one_pixel = x.clone(), x.clone()
    one_channel[:, 3] = 7
    one_pixel[1, 2, 3, 4] = 7
    seen = [sum(_differs(x, other) for _ in range(150)) for other in (one_channel, one_pixel)]
    assert seen[0] > 75
    assert seen[1] > 0


def _differs(x: Tensor, other: Tensor) -> bool:
    try:
        witness(x).check(other)
    except ComputedOtherwise:
        return True
    return False


def test_where_it_does_not_look() -> None:
    x = torch.randn(8, 64)
    assert Witness.of(x[:, ::2]) is None  # with gaps
    assert Witness.of(torch.arange(640)) is None
    assert Witness.of(x.to("meta")) is None
    assert Witness.of(x[0, :8]) is None
    witness(x).check(2 * x.t().contiguous().t())  # lies otherwise in memory: no place is comparable


def test_the_sentence_survives_another_process() -> None:
    error = ComputedOtherwise.at(torch.Size([2, 3]), 1.0, 2.0)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_views_start_where_they_start() -> None:
    x = torch.randn(4, 64, 4)
    witness(x[2]).check(x[2].clone())
    with pytest.raises(ComputedOtherwise):
        witness(x[2]).check(x[1].clone())


def test_a_tensor_of_another_size_or_type_is_another() -> None:
    x = torch.randn(64, 16)
    held = witness(x)
    for other in (x[:20].clone(), x.double(), x.bfloat16(), torch.empty(0, 16)):
        with pytest.raises(ComputedOtherwise):
            held.check(other)
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ComputedOtherwise, match="1024 numbers where it held 1024"):
        held.check(freed)
