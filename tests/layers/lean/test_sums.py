"""Sums of channels-last maps: as precise as those of contiguous ones, and the same for whatever size."""

import pytest
import torch
from torch import Tensor, nn

from revnets.kernels.norms import Norm
from revnets.layers.lean import sums
from revnets.layers.lean.ops import batch_norm_grad

SIZES = [(4, 24, 56, 56), (2, 5, 3, 7), (3, 7, 1, 1), (2, 300, 8, 8), (1, 1, 4, 4), (2, 4098, 2, 2), (3, 6, 4, 12)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


@pytest.fixture(params=["large maps", "whatever divides"])
def in_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps are left to torch's kernel; here, too, in parts where their pixels divide."""
    if request.param == "whatever divides":
        monkeypatch.setattr(sums, "FEW", 1)
        monkeypatch.setattr(sums, "PART", 1)


def maps(size: tuple[int, ...], count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(size))
    return [torch.randn(size, generator=generator) * 2 + 3 for _ in range(count)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_those_of_a_batch_norm(size: tuple[int, ...], layout: str) -> None:
    x = maps(size)[0].contiguous(memory_format=LAYOUTS[layout])
    norm = nn.BatchNorm2d(size[1], momentum=0.3).double()
    norm(x.double())
    running_mean, running_var = torch.zeros(size[1]), torch.ones(size[1])
    mean, var = sums.batch_statistics(x, running_mean, running_var, 0.3)
    assert error(mean, x.double().mean((0, 2, 3))) < 1e-6
    assert error(var, x.double().var((0, 2, 3), correction=0)) < 1e-6
    assert error(running_mean, norm.running_mean) < 1e-6
    assert error(running_var, norm.running_var) < 1e-6


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layouts", [("contiguous",) * 2, ("channels last",) * 2, ("contiguous", "channels last")])
def test_gradients_are_those_of_a_batch_norm(size: tuple[int, ...], layouts: tuple[str, str]) -> None:
    grad, x = (t.contiguous(memory_format=LAYOUTS[one]) for t, one in zip(maps(size, 2), layouts, strict=True))
    weight = torch.linspace(0.5, 2, size[1])
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    found = batch_norm_grad(grad, Norm(x, weight, weight, mean, var, 1e-3, ""), (True, True, True))
    inputs = [t.double().requires_grad_() for t in (x, weight, weight)]
    y = torch.nn.functional.batch_norm(inputs[0], None, None, inputs[1], inputs[2], True, 0.0, 1e-3)
    expected = torch.autograd.grad(y, inputs, grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert float((ours.double() - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max()))


def test_channels_last_sums_lose_no_precision() -> None:
    """torch's kernels lose ten times as much on channels-last maps as on contiguous ones."""
    size = (8, 16, 64, 64)
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in maps(size, 2))
    exact = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    found = sums.batch_statistics(x, torch.zeros(16), torch.ones(16), 0.1)
    invstd = exact[1].rsqrt()
    hat = (x.double() - exact[0][:, None, None]) * invstd[:, None, None]
    scales = [t.abs().sum((0, 2, 3)) for t in (grad.double() * hat, grad.double())]
    exact_grads = (grad.double() * hat).sum((0, 2, 3)), grad.double().sum((0, 2, 3))
    grads = sums.affine_grads(grad, x, torch.ones(16), exact[0].float(), invstd.float(), 0.0)
    assert max(map(error, found, exact)) < 3e-7
    assert max(float(((g - e) / s).abs().max()) for g, e, s in zip(grads, exact_grads, scales, strict=True)) < 1e-7
