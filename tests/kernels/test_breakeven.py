"""What decides between the kernel and the dense path: measured once per case, kept, and never in the program's way."""

import functools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import revnets
from revnets.kernels import breakeven
from revnets.kernels.breakeven import Case, pays
from revnets.kernels.build import Geometry
from revnets.kernels.cache import CACHE_VARIABLE
from revnets.kernels.compiler import turn
from revnets.kernels.training import Structure
from revnets.kernels.windows import structure_of
from revnets.layers import SparseConv2d, SparseLinear, use_sparse_kernel

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
    breakeven._frame_fits.cache_clear()


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
    assert pays(_structure(0.1), x, False)
    assert pays(_structure(0.1), x, False)
    assert not pays(_structure(0.4), x, False)
    assert not pays(_structure(0.4), x, False)
    assert [case.by_pixel for case in measured] == [False, True, False]  # of what pays, either layout
    (record,) = caplog.records
    assert record.getMessage().startswith("stays dense: 16 -> 24 (3x3, stride 2) @ 2x8x8")


@needs_kernel
@pytest.mark.parametrize("slow", [None, False, True])
@pytest.mark.parametrize("first", [torch.channels_last, torch.contiguous_format])
def test_the_layout_that_is_seen_first_decides_nothing(
    slow: bool | None, first: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run, in one that resumes, where a network computes a layer again: it pays in both, or stays dense."""
    monkeypatch.setattr(breakeven, "_measured", lambda case: (2.0 if case.by_pixel == slow else 1.0, 1.5))
    structure, x = _structure(0.1), images(side=8)
    for layout in (first, torch.channels_last, torch.contiguous_format):
        assert pays(structure, x.contiguous(memory_format=layout), False) == (slow is None)


@needs_kernel
def test_verdicts_are_kept_for_the_next_process(measured: list[Case], tmp_path: Path) -> None:
    x = images(side=8)
    assert pays(_structure(0.1), x, False)
    _forget()
    assert pays(_structure(0.1), x, False)
    assert not pays(_structure(0.4), x, False)
    assert len(measured) == 3
    _forget()
    assert not pays(_structure(0.4), x, False)
    assert len(measured) == 3
    (file,) = tmp_path.glob("breakeven-*.json")
    for damaged in ("", "[]", "{", '{"a": 1}', '{"a": [1, "x"]}'):
        file.write_text(damaged)
        _forget()
        assert pays(_structure(0.1), x, False)
    assert len(measured) == 13


@needs_kernel
def test_what_another_process_found_first_counts(measured: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    def late(case: Case) -> tuple[float, float]:
        breakeven._keep(case, (1.0, 2.0))
        return 2.0, 1.0

    monkeypatch.setattr(breakeven, "_measured", late)
    assert pays(_structure(0.1), images(side=8), False)


@needs_kernel
def test_processes_write_verdicts_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is lost: nobody reads the file while another process is about to write it."""
    ours, others = (Case.of(Geometry(16, outputs), (2, 8, 8), 0.1, False, False) for outputs in (24, 32))
    path, plain, reading = breakeven._file(), breakeven._kept, threading.Event()
    assert path is not None

    def kept() -> dict[str, tuple[float, float]]:
        reading.set()
        return plain()

    with turn(path.with_name(f"{path.name}.lock")):
        monkeypatch.setattr(breakeven, "_kept", kept)
        thread = threading.Thread(target=breakeven._keep, args=(ours, (1.0, 2.0)))
        thread.start()
        assert not reading.wait(0.2)
        breakeven._write(path, {repr(others): (3.0, 4.0)})
    thread.join()
    assert plain() == {repr(ours): (1.0, 2.0), repr(others): (3.0, 4.0)}


@needs_kernel
def test_no_temporary_file_is_left(measured: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr("os.replace", full)
    assert pays(_structure(0.1), images(side=8), False)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@needs_kernel
def test_without_a_folder_that_can_be_written(measured: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakeven, "folders", lambda problems: iter(()))
    for _ in range(2):
        assert pays(_structure(0.1), images(side=8), False)
    assert len(measured) == 2


@needs_kernel
@pytest.mark.parametrize("geometry", [THREE, Geometry(16, 24, groups=2), Geometry(16, 24, (1, 1), (2, 2))])
@pytest.mark.parametrize("by_pixel", [False, True])
def test_measuring_changes_nothing_of_the_program(geometry: Geometry, by_pixel: bool) -> None:
    before = torch.get_rng_state()
    kept = saved_tensors_hooks(lambda t: pytest.fail("kept for a backward pass of the program"), lambda t: t)
    with torch.inference_mode(), torch.device("meta"), kept:
        seconds = breakeven._measured(Case.of(geometry, (2, 8, 8), 0.1, by_pixel, False))
    assert min(seconds) > 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((1.0, 4.0, 2.0, 4.0), (5.0, 6.0)),  # the backward pass gains nothing
        ((4.0, 1.0, 4.0, 3.0), (9.0, 11.0)),  # nor the forward pass, which is made twice
    ],
)
def test_a_layer_pays_with_its_forward_pass_made_once_or_twice(
    times: tuple[float, ...], expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [lambda taken=taken: taken for taken in times]
    monkeypatch.setattr(breakeven, "_steps", lambda case: (passes[:2], passes[2:]))
    monkeypatch.setattr(breakeven, "_seconds", lambda each, threads: each())
    monkeypatch.setattr(breakeven, "_OVERHEAD", 0.0)
    assert breakeven._measured(Case.of(THREE, (2, 8, 8), 0.1, False, False)) == expected


@pytest.mark.parametrize(
    ("seconds", "ratio", "rounds"),
    [(1.0, 3.0, 2), (1.0, 1.2, 5), (1e-4, 3.0, 4), (1e-6, 3.0, 50)],  # large, near the break-even, small, tiny
)
def test_small_layers_are_timed_for_as_long_as_it_takes_to_know(
    seconds: float, ratio: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[float] = []

    def taking(taken: float) -> float:
        called.append(taken)
        return taken

    passes = [functools.partial(taking, taken) for taken in (seconds, seconds, ratio * seconds, ratio * seconds)]
    monkeypatch.setattr(breakeven, "_steps", lambda case: (passes[:2], passes[2:]))
    monkeypatch.setattr(breakeven, "_seconds", lambda each, threads: each())
    breakeven._measured(Case.of(THREE, (2, 8, 8), 0.1, False, False))
    assert len(called) == 4 * (rounds + 1)  # one that does not count


@needs_kernel
@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        (Geometry(4, 8, (17, 17)), (8, 17, 17)),  # rounded down, it would be 16
        (Geometry(2, 8, (70, 1)), (1, 80, 16)),  # longer than images that are measured
        (Geometry(4, 8, (5, 5), (2, 2), (2, 2), (5, 5)), (2, 17, 18)),
    ],
)
def test_windows_as_large_as_the_image_can_be_measured(geometry: Geometry, size: Any) -> None:
    assert min(breakeven._measured(Case.of(geometry, size, 0.1, False, False))) > 0


@needs_kernel
def test_images_that_are_too_small_are_left_to_torch(measured: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revnets.layers.sparse_ift.sparse, "pays", pays)
    made = SparseConv2d(16, 24, 7, sparsity=0.9)
    use_sparse_kernel(made)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ernel size"):
            made(images(side=4))
    assert not measured


@needs_kernel
def test_measuring_in_a_program_of_another_default_dtype() -> None:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for geometry, linear in ((THREE, False), (Geometry(16, 24), False), (Geometry(16, 24), True)):
            size = (8, 1, 1) if linear else (2, 8, 8)
            assert min(breakeven._measured(Case.of(geometry, size, 0.1, linear, linear))) > 0
    finally:
        torch.set_default_dtype(kept)


@needs_kernel
def test_frames_that_hold_too_much_memory(measured: list[Case], caplog: pytest.LogCaptureFixture) -> None:
    """Not even measured; images in a batch count one by one."""
    caplog.set_level(logging.INFO)
    structure = _structure(0.1, Geometry(64, 8, (3, 3), (1, 1), (1, 1)))
    for _ in range(2):
        assert not pays(structure, torch.zeros(()).expand(1, 64, 300, 300), False)
    assert not measured
    (record,) = caplog.records
    assert record.getMessage().startswith("stays dense: 64 -> 8 @ 300x300: a frame of 23 MB")
    assert pays(structure, torch.zeros(()).expand(100, 64, 100, 100), False)
    assert pays(_structure(0.1, Geometry(64, 8)), torch.zeros(()).expand(1, 64, 300, 300), False)  # without frames


@needs_kernel
def test_linear_layers_are_measured_against_linear_layers(
    measured: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images that are channels last, too."""
    monkeypatch.setattr(revnets.layers.sparse_ift.sparse, "pays", pays)
    made = SparseLinear(16, 24, sparsity=0.9)
    use_sparse_kernel(made)
    for size in ((2, 6, 16), (12, 16), (1, 3, 4, 16)):
        made(torch.zeros(size))
    assert [(case.linear, case.size) for case in measured] == [(True, (12, 1, 1))]


@needs_kernel
def test_a_linear_layer_can_be_measured() -> None:
    assert min(breakeven._measured(Case.of(Geometry(16, 24), (10, 1, 1), 0.1, True, True))) > 0


@needs_kernel
def test_a_layer_follows_the_verdict(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks again for another input, and for another mask."""
    made, asked = layer(), []

    def verdict(structure: Structure, x: Tensor, linear: bool) -> bool:
        assert not linear
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


@given(
    sides=st.tuples(*[st.integers(1, 200)] * 2),
    kernel=st.tuples(*[st.integers(1, 90)] * 2),
    padding=st.integers(0, 8),
    dilation=st.integers(1, 3),
)
def test_what_is_measured_has_an_output(sides: Any, kernel: Any, padding: int, dilation: int) -> None:
    geometry = Geometry(4, 4, kernel, (1, 2), (padding, padding), (dilation, dilation))
    assume(min(geometry.output_size(*sides)) > 0)
    case = Case.of(geometry, (3, *sides), 0.1, False, False)
    assert min(geometry.output_size(*case.size[1:])) > 0
    assert min(case.size) > 0


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
