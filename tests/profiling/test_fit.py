"""Largest batch or image: found with few predictions, at the very edge, and refused in one sentence."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revnets.profiling.fake import ProfileError
from revnets.profiling.fit import DoesNotFitError, fit, largest, parse_budget
from revnets.profiling.profile import predict
from revnets.profiling.target import Setting, Target

SETTING = Setting(optimizer=None)
TINY = Target("resnet18", 64, 2, "store")


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5mb", 1_500_000), ("512B", 512)]
)
def test_budgets(text: str, expected: int) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "24", "GB", "0GB", "-1GB", "24 gigs"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(ProfileError, match=re.escape(f"budget {text!r}: expected a size such as 24GB")):
        parse_budget(text)


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(0, 100), st.sampled_from([1, 2]), st.integers(0, 10**6))
def test_largest_is_the_edge(base: int, slope: int, step: int, power: int, budget: int) -> None:
    probes = []

    def need(n: int) -> int:
        probes.append(n)
        return base + slope * n**power + step * (n // 7)  # nearly in proportion, with jumps

    n = largest(need, budget, power)
    assert n == 0 or base + slope * n**power + step * (n // 7) <= budget
    assert base + slope * (n + 1) ** power + step * ((n + 1) // 7) > budget
    assert len(probes) < 40


@pytest.mark.parametrize("n", [1, 2, 4, 5, 17, 64])
@pytest.mark.parametrize("power", [1, 2])
def test_what_fits_to_the_byte_fits(n: int, power: int) -> None:
    def need(m: int) -> int:
        return 100 + 3 * m**power

    assert largest(need, need(n), power) == n
    assert largest(need, need(n) - 1, power) == n - 1


@pytest.mark.parametrize("what", ["batch", "image"])
def test_fit_is_the_edge(what: str) -> None:
    budget = 200_000_000
    found = fit(TINY, SETTING, budget, what)
    assert found.predicted.peak_bytes <= budget < found.next_bytes
    assert found.predicted.peak_bytes == predict(found.target, SETTING).peak_bytes
    fixed = found.target.img_size == 64 if what == "batch" else found.target.batch_size == 2
    assert fixed


def test_a_budget_that_not_even_one_sample_fits() -> None:
    with pytest.raises(DoesNotFitError, match="not even batch 1 fits 1e-06 GB, it needs"):
        fit(TINY, SETTING, 1000)
