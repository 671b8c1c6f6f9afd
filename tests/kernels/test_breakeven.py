"""What decides between the kernel and the dense path: measured once per case, kept, and never in the program's way."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import revnets
from revnets.kernels import breakeven
from revnets.kernels.breakeven import Case, pays
from revnets.kernels.build import Geometry
from revnets.kernels.cache import CACHE_VARIABLE
from revnets.kernels.training import Structure
from revnets.kernels.windows import structure_of

from .nets import images, layer, needs_kernel

THREE = Geometry(16, 24, (3, 3), (2, 2), (1, 1))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    _forget()
    yield
    _forget()


def _forget() -> None:
    """As in a new process."""
    breakeven._pays.cache_clear()
    breakeven._file.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Cases that were measured: the kernel is said to pay where most weights are zeros."""
    seen: list[Case] = []

    def measure(case: Case) -> tuple[float, float]:
        seen.append(case)
        return case.density, 0.25

    monkeypatch.setattr(breakeven, "_measured", measure)
    return seen


def _structure(density: float, geometry: Geometry = THREE) -> Structure:
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
    return structure_of(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density, geometry)


@needs_kernel
def test_each_case_is_measured_once(measured: list[Case], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    x = images(side=8)
    assert pays(_structure(0.1), x)
    assert pays(_structure(0.1), x)
    assert not pays(_structure(0.4), x)
    assert not pays(_structure(0.4), x)
    assert len(measured) == 2
    (record,) = caplog.records
    assert record.getMessage().startswith("stays dense: 16 -> 24 (3x3, stride 2) @ 2x8x8")


@needs_kernel
def test_a_layer_computed_again_in_another_layout_goes_the_same_way(measured: list[Case]) -> None:
    structure, x = _structure(0.1), images(side=8)
    for layout in (torch.channels_last, torch.contiguous_format):
        assert pays(structure, x.contiguous(memory_format=layout))
    assert [case.by_pixel for case in measured] == [True]


@needs_kernel
def test_verdicts_are_kept_for_the_next_process(measured: list[Case], tmp_path: Path) -> None:
    x = images(side=8)
    assert pays(_structure(0.1), x)
    _forget()
    assert pays(_structure(0.1), x)
    assert not pays(_structure(0.4), x)
    assert len(measured) == 2
    _forget()
    assert not pays(_structure(0.4), x)
    assert len(measured) == 2
    (file,) = tmp_path.glob("breakeven-*")
    for damaged in ("", "[]", "{", '{"a": 1}', '{"a": [1, "x"]}'):
        file.write_text(damaged)
        _forget()
        assert pays(_structure(0.1), x)
    assert len(measured) == 7


@needs_kernel
def test_what_another_process_found_first_counts(measured: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    def late(case: Case) -> tuple[float, float]:
        breakeven._keep(case, (1.0, 2.0))
        return 2.0, 1.0

    monkeypatch.setattr(breakeven, "_measured", late)
    assert pays(_structure(0.1), images(side=8))


@needs_kernel
def test_without_a_folder_that_can_be_written(measured: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakeven, "folders", lambda problems: iter(()))
    for _ in range(2):
        assert pays(_structure(0.1), images(side=8))
    assert len(measured) == 1


@needs_kernel
@pytest.mark.parametrize("geometry", [THREE, Geometry(16, 24, groups=2), Geometry(16, 24, (1, 1), (2, 2))])
@pytest.mark.parametrize("by_pixel", [False, True])
def test_measuring_changes_nothing_of_the_program(geometry: Geometry, by_pixel: bool) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.device("meta"):
        seconds = breakeven._measured(Case.of(geometry, (2, 8, 8), 0.1, by_pixel, False))
    assert min(seconds) > 0
    assert torch.equal(before, torch.get_rng_state())


@needs_kernel
def test_linear_layers_are_measured_against_linear_layers(measured: list[Case]) -> None:
    structure = _structure(0.1, Geometry(16, 24))
    assert pays(structure, torch.zeros(2, 5, 16))
    assert pays(structure, torch.zeros(10, 16))
    assert [(case.linear, case.size) for case in measured] == [(True, (10, 1, 1))]


@needs_kernel
def test_a_linear_layer_can_be_measured() -> None:
    assert min(breakeven._measured(Case.of(Geometry(16, 24), (10, 1, 1), 0.1, True, True))) > 0


@needs_kernel
def test_a_layer_follows_the_verdict(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks again for another input, and for another mask."""
    made, asked = layer(), []

    def verdict(structure: Structure, x: Tensor) -> bool:
        asked.append(x.shape)
        return structure.density < 0.1

    monkeypatch.setattr(revnets.layers.sparse_ift.sparse, "pays", verdict)
    for x in (images(), images(), images(3)):
        made(x)
    assert asked == [images().shape, images(3).shape]
    assert not calls
    made.set_mask(made.mask & (torch.rand(made.mask.shape) < 0.2))
    made(images(3))
    assert len(calls) == 1


@given(size=st.tuples(*[st.integers(1, 2000)] * 3), density=st.floats(0, 0.5), kernel=st.sampled_from([1, 3]))
def test_what_is_measured_is_small(size: Any, density: float, kernel: int) -> None:
    case = Case.of(Geometry(64, 64, (kernel, kernel), (1, 1), (1, 1)), size, density, False, False)
    n, height, width = case.size
    assert 1 <= height <= 64
    assert 1 <= width <= 64
    products = n * height * width * 64 * 64 * kernel**2
    assert n == 1 or products <= 2**28
    assert case.density >= density * 0.999
    near = Case.of(case.geometry, (size[0], height, width), density, False, False)
    assert near.size[1:] == (height, width)
