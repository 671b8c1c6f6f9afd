"""Single layers side by side: which are compared, and that each computes the layer."""

import math

import pytest
import torch
import torch.nn.functional as F

from revnets.deploy import compare_layers
from revnets.deploy.compare import _byte_way, _dense_ways, _pruned, _sparse_way, speedups
from revnets.kernels.build import kernel_problem
from revnets.kernels.byte_blocks import from_blocks

needs_kernel = pytest.mark.skipif(kernel_problem() is not None, reason=f"no kernel: {kernel_problem()}")


@needs_kernel
@pytest.mark.parametrize("blocked", [False, True])
def test_rows(blocked: bool) -> None:
    rows = compare_layers([0.5, 0.9], [(8, 12, 5)], repeats=1, blocked=blocked)
    wanted = [(0.0, "torch, best of three", "float32"), (0.5, "sparse", "float32"), (0.9, "sparse", "float32")]
    if blocked:
        wanted += [(0.5, "sparse int8", "int8"), (0.9, "sparse int8", "int8")]
    assert [(row.sparsity, row.engine, row.precision) for row in rows] == wanted
    assert all(ratio > 0 for _, ratio in speedups(rows, any_precision=True))
    assert [math.isnan(ratio) for _, ratio in speedups(rows)] == [row.precision == "int8" for row in rows]


@needs_kernel
def test_every_way_computes_the_layer() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 8, 5, 5), torch.randn(12, 8, 1, 1), torch.randn(12)
    pruned = _pruned(weight, 0.5, 4)
    assert int((pruned.reshape(12, 2, 4) != 0).any(2).sum()) == 12
    assert torch.equal(pruned, torch.where(pruned != 0, weight, 0.0))
    expected = F.conv2d(x, pruned, bias)
    for way in (*_dense_ways(x, pruned, bias), _sparse_way(x, pruned, bias)):
        assert torch.allclose(way().reshape(expected.shape), expected, atol=1e-5)
    found = (from_blocks(_byte_way(x, pruned)(), 12).float() - 128) / 32
    expected = F.conv2d(x, pruned)
    inside = expected.abs() < 3.9  # of 4, where bytes end
    assert (found - expected)[inside].abs().max() < 0.02 * expected.abs().max()  # a byte is 1/32 wide
