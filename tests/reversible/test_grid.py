"""The grid of exact mode: what it holds without loss, and the magnitudes that its guard looks at."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revnets.reversible import RangeError
from revnets.reversible.grid import add_rounded, check_range, grid_limit, max_abs, round_to_grid, sub_rounded_

LAYOUTS = ("contiguous", "channels last", "strided", "transposed")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.cat([x, 100 * x], dim=1)[:, : x.shape[1]]
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "transposed" else x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-6e4, 6e4, width=16), min_size=12, max_size=12),
    sign=st.sampled_from([-1, 0, 1]),
)
def test_the_largest_magnitude_of_either_sign(layout: str, dtype: torch.dtype, values: list[float], sign: int) -> None:
    x = torch.tensor(values, dtype=dtype).view(1, 2, 2, 3)
    x = laid_out(x if sign == 0 else sign * x.abs(), layout)
    assert max_abs(x) == x.abs().max()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_number_that_is_none_is_noticed(layout: str, odd: float) -> None:
    x = torch.zeros(1, 2, 2, 3)
    x[0, 1, 1, 0] = odd
    found = max_abs(laid_out(x, layout)).item()
    assert found != found if odd != odd else found == math.inf
    with pytest.raises(RangeError, match="non-finite"):
        check_range(found, 12, torch.float32, "here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(bits=st.integers(1, 20), x=st.integers(-(2**30), 2**30), branch=st.floats(-1, 1))
def test_sums_within_the_range_lose_nothing(dtype: torch.dtype, bits: int, x: int, branch: float) -> None:
    """A stream up to the limit, branches that add up to twice the limit: taking away what was added gives it back."""
    limit, step = grid_limit(bits, dtype), 2.0**-bits
    steps = int(limit / step)
    stream = torch.tensor((x % (2 * steps + 1) - steps) * step, dtype=dtype)
    value = torch.tensor(2 * limit * branch, dtype=dtype)
    added = round_to_grid(value, bits)
    assert (added / step).frac() == 0
    assert abs(float(added) - float(value)) <= step / 2
    assert torch.equal((stream + added) - added, stream)
    assert torch.equal(add_rounded(stream, value, bits), stream + added)
    for owned in (False, True):
        rest = stream + added
        sub_rounded_(rest, value.clone(), bits, owned)
        assert torch.equal(rest, stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 12, 20])
def test_the_limit_itself_is_within_the_range(bits: int, dtype: torch.dtype) -> None:
    limit = grid_limit(bits, dtype)
    check_range(limit, bits, dtype, "here")
    with pytest.raises(RangeError, match="beyond the range"):
        check_range(limit * (1 + 1e-6), bits, dtype, "here")
