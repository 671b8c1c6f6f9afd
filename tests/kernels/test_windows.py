"""Convolutions of any window on the training kernel: gradients against float64, and the layers that take it."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import revnets
from revnets.kernels import frames
from revnets.kernels.build import Geometry
from revnets.kernels.training import Structure, sparse_conv
from revnets.kernels.windows import WindowStructure, frame_bytes, windows_fit
from revnets.layers import SparseConv2d, use_sparse_kernel

from .nets import assert_close, images, needs_kernel, step

LAYOUTS = st.sampled_from([torch.contiguous_format, torch.channels_last])


def _pair(least: int, most: int) -> Any:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@needs_kernel
@settings(max_examples=120, deadline=None)
@given(
    channels=_pair(1, 40),
    kernel=_pair(1, 4),
    stride=_pair(1, 3),
    padding=_pair(0, 5),
    dilation=_pair(1, 3),
    size=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 40)),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    bias=st.booleans(),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    seed=st.integers(0, 99),
)
def test_gradients(
    channels: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    size: Any,
    sparsity: float,
    bias: bool,
    layouts: Any,
    seed: int,
) -> None:
    """Outputs of a pixel, padding wider than the kernel, phases without weights, blocks of several images."""
    geometry = Geometry(channels[0], channels[1], kernel, stride, padding, dilation)
    assume(min(geometry.output_size(*size[1:])) > 0)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(channels[1], channels[0], *kernel, generator=generator) >= sparsity
    mask[0] = False
    x = torch.randn(size[0], channels[0], *size[1:], generator=generator).to(memory_format=layouts[0])
    operands = [x, torch.randn(mask.shape, generator=generator)]
    operands += [torch.randn(len(mask), generator=generator)] if bias else []
    ours = [t.clone().requires_grad_() for t in operands]
    theirs = [t.double().requires_grad_() for t in operands]
    y = sparse_conv(ours[0], ours[1], ours[2] if bias else None, WindowStructure(mask, geometry))
    expected = F.conv2d(theirs[0], theirs[1] * mask, theirs[2] if bias else None, stride, padding, dilation)
    dy = torch.randn(y.shape, generator=generator).to(memory_format=layouts[1])
    y.backward(dy)
    expected.backward(dy.double())
    assert_close([y, *(t.grad for t in ours)], [expected, *(t.grad for t in theirs)])  # type: ignore[list-item]
    assert not ours[1].grad[~mask].any()  # type: ignore[index]


@needs_kernel
@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    """Few images are shared out by output channels, many by images."""
    geometry = Geometry(48, 72, (3, 3), (2, 1), (1, 1))
    found: list[list[Any]] = []
    mask = torch.rand(72, 48, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.2
    kept = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            for n in (1, 40):
                x = images(n, 48, 17).requires_grad_()
                weight = torch.linspace(-1, 1, mask.numel()).view(mask.shape).requires_grad_()
                y = sparse_conv(x, weight, None, WindowStructure(mask, geometry))
                y.backward(y.detach().cos())
                found.append([y.detach(), x.grad, weight.grad])
    finally:
        torch.set_num_threads(kept)
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, ours, theirs))


@needs_kernel
def test_gradients_of_the_input_alone() -> None:
    """The input is not kept for them, but its size is: one of a stride is not known from the output."""
    mask = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    structure = WindowStructure(mask, Geometry(4, 8, (3, 3), (2, 2), (1, 1)))
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    for side in (7, 8):
        x, other = images(2, 4, side).requires_grad_(), images(2, 4, side).requires_grad_()
        sparse_conv(x, weight, None, structure).square().sum().backward()
        F.conv2d(other, weight * mask, None, 2, 1).square().sum().backward()
        assert_close([x.grad], [other.grad])  # type: ignore[list-item]


@needs_kernel
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_too", [False, True])
@pytest.mark.parametrize("side", [1, 4])
def test_gradients_are_laid_out_as_the_input(layout: torch.memory_format, weight_too: bool, side: int) -> None:
    """Where the window leaves one pixel, too, of which the gradient's strides say nothing; and as torch does."""
    mask = torch.rand(8, 4, side, side, generator=torch.Generator().manual_seed(0)) < 0.5
    structure = WindowStructure(mask, Geometry(4, 8, (side, side), (2, 2)))
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1), requires_grad=weight_too)
    found = []
    for convolve in (lambda x: sparse_conv(x, weight, None, structure), lambda x: F.conv2d(x, weight * mask, None, 2)):
        x = images(2, 4, side).contiguous(memory_format=layout).requires_grad_()
        y = convolve(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones(y.shape))
        assert grad.stride() == x.stride()
        found.append((y, grad))
    assert found[0][0].stride() == found[1][0].stride()
    assert_close(*map(list, found))


@needs_kernel
@pytest.mark.parametrize(
    "numbers",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (1, 5), "padding": "same", "dilation": 2},
        {"kernel_size": 4, "padding": "valid"},
    ],
)
def test_layers(calls: list[torch.Size], numbers: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = SparseConv2d(16, 24, sparsity=0.8, **numbers)
    expected = step(copy.deepcopy(made).double(), images(side=11).double())
    assert use_sparse_kernel(made) == 1
    assert_close(step(made, images(side=11)), expected)
    placed = made.to(memory_format=torch.channels_last)
    assert_close(step(placed, images(side=11).to(memory_format=torch.channels_last)), expected)
    assert len(calls) == 2


@needs_kernel
@pytest.mark.parametrize(
    "numbers",
    [
        {"stride": (1, 1)},
        {"padding": (2, 2), "dilation": (2, 2)},
        {"stride": 1, "padding": 2},  # as torch's own layers take them
        {"padding": "same", "stride": (1, 1)},
        {"padding": "valid"},
    ],
)
def test_settings_may_change_between_two_passes(calls: list[torch.Size], numbers: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = SparseConv2d(16, 24, 3, stride=2, padding=1, sparsity=0.8)
    use_sparse_kernel(made)
    made(images(side=11))
    for name, value in numbers.items():
        setattr(made, name, value)
    expected = step(copy.deepcopy(made).double(), images(side=11).double())
    assert_close(step(made, images(side=11)), expected)
    assert len(calls) == 2


@needs_kernel
def test_settings_that_the_kernel_has_no_loop_for(calls: list[torch.Size]) -> None:
    """Nor when they come later; with others the layer goes back to it."""
    made = SparseConv2d(16, 24, 3, sparsity=0.8)
    use_sparse_kernel(made)
    made(images(side=11))
    made.stride = (9, 9)
    assert made(images(side=11)).shape == (2, 24, 1, 1)
    assert len(calls) == 1
    made.stride = (2, 2)
    assert made(images(side=11)).shape == (2, 24, 5, 5)
    assert len(calls) == 2


@needs_kernel
def test_other_settings_are_asked_for_again(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(structure: Structure, x: Tensor, linear: bool) -> bool:
        return structure.geometry.stride == (1, 1)

    monkeypatch.setattr(revnets.layers.sparse_ift.sparse, "pays", verdict)
    made = SparseConv2d(16, 24, 3, stride=2, sparsity=0.8)
    use_sparse_kernel(made)
    made(images(side=11))
    assert not calls
    made.stride = (1, 1)
    made(images(side=11))
    assert len(calls) == 1


@needs_kernel
@pytest.mark.parametrize(
    ("geometry", "exact"),
    [
        (Geometry(8, 4, (3, 3), (1, 1), (1, 1)), True),
        (Geometry(4, 8, (3, 3), (1, 1), (1, 1)), True),
        (Geometry(8, 4, (3, 2), (2, 3), (1, 0), (2, 1)), False),
        (Geometry(3, 9, (1, 1), (2, 2)), False),
        (Geometry(2, 3, (2, 5), (3, 1), (4, 6), (1, 2)), False),
    ],
)
def test_no_frame_is_larger_than_foreseen(geometry: Geometry, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = frames._struct

    def struct(*args: Any) -> Any:
        made = plain(*args)
        seen.append(4 * made.c_in * made.stride_h * made.stride_w * made.frame_h * made.frame_w)
        return made

    monkeypatch.setattr(frames, "_struct", struct)
    mask = torch.ones(geometry.out_channels, geometry.in_channels, *geometry.kernel_size, dtype=torch.bool)
    x = images(2, geometry.in_channels, 13).requires_grad_()
    weight = torch.ones(mask.shape, requires_grad=True)
    sparse_conv(x, weight, None, WindowStructure(mask, geometry)).sum().backward()
    assert len(seen) >= 3
    foreseen = frame_bytes(geometry, 13, 13)
    assert max(seen) == foreseen if exact else max(seen) <= foreseen <= 2 * max(seen)


@needs_kernel
def test_layers_that_stay_dense(calls: list[torch.Size]) -> None:
    """Groups, padding by anything but zeros, padding that differs from side to side."""
    layers: list[nn.Module] = [
        SparseConv2d(16, 16, 3, padding=1, groups=2, sparsity=0.8),
        SparseConv2d(16, 16, 3, padding=1, groups=16, sparsity=0.8),
        SparseConv2d(16, 16, 3, padding=1, padding_mode="reflect", sparsity=0.8),
        SparseConv2d(16, 16, 2, padding="same", sparsity=0.8),
        SparseConv2d(16, 16, 1, stride=9, sparsity=0.8),
    ]
    model = nn.Sequential(*layers)
    assert use_sparse_kernel(model) == 0
    model(images())
    assert not calls
    assert not windows_fit(Geometry(4000, 8, (3, 3)))


@needs_kernel
def test_images_smaller_than_the_window() -> None:
    """Torch says so."""
    made = SparseConv2d(16, 24, 5, sparsity=0.8)
    use_sparse_kernel(made)
    with pytest.raises(RuntimeError, match="ernel size"):
        made(images(side=4))


@needs_kernel
def test_what_does_not_belong_together_is_refused() -> None:
    geometry = Geometry(4, 8, (3, 3))
    mask = torch.ones(8, 4, 3, 3, dtype=torch.bool)
    structure = WindowStructure(mask, geometry)
    values = torch.ones(mask.numel())
    with pytest.raises(ValueError, match="expected that of Geometry"):
        WindowStructure(mask[:, :2], geometry)
    with pytest.raises(ValueError, match="bool"):
        WindowStructure(mask.float(), geometry)
    for x in (images(2, 3, 6), images(2, 4, 2), images()[0]):
        with pytest.raises(ValueError, match="input of shape"):
            structure.convolve(x, values)
    with pytest.raises(ValueError, match="values of 9 numbers"):
        structure.convolve(images(2, 4, 6), values[:9])
    with pytest.raises(ValueError, match="gradient of shape"):
        structure.grads(images(2, 8, 5), images(2, 4, 6), values, mask.shape, (True, True, False))
    with pytest.raises(ValueError, match="a weight of"):
        structure.grads(images(2, 8, 4), images(2, 4, 6), values, torch.Size((8, 4, 3, 1)), (True, True, False))
