"""Deformable convolution and attention against torchvision and formulas, through ``mmcv.ops``."""

from typing import Any

import pytest
import torch
import torchvision

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
operators = pytest.importorskip("revnets.mm.operators", reason=REASON, exc_type=ImportError)


GEOMETRIES = [(2, 1, 1), ((1, 2), (0, 1), (2, 1)), ((3, 1), (2, 0), (1, 2))]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution_and_its_gradients(modulated: bool, geometry: tuple[Any, Any, Any]) -> None:
    """Strides, paddings and dilations of height and width are each their own."""
    operators.install()
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 9)
    size = torch.nn.functional.conv2d(x, torch.zeros(1, 4, 3, 3), None, *geometry).shape[2:]
    offset, mask = torch.randn(2, 2 * 2 * 9, *size), torch.rand(2, 2 * 9, *size)
    weight, bias = torch.randn(6, 2, 3, 3), torch.randn(6)  # 2 groups, 2 groups of offsets
    mine, theirs = ([t.clone().requires_grad_() for t in (x, offset, mask, weight, bias)] for _ in range(2))
    if modulated:
        y = modulated_deform_conv2d(*mine, *geometry, 2, 2)
        x, offset, mask, weight, bias = theirs
        expected = torchvision.ops.deform_conv2d(x, offset, weight, bias, *geometry, mask)
    else:
        y = deform_conv2d(mine[0], mine[1], mine[3], *geometry, 2, 2)
        x, offset, _, weight, _ = theirs
        expected = torchvision.ops.deform_conv2d(x, offset, weight, None, *geometry)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_modulated_convolution_reads_the_first_values_of_larger_maps() -> None:
    """As mmcv's kernel, which counts in memory by the size of its output, one image after the other."""
    operators.install()
    from mmcv.ops import modulated_deform_conv2d

    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 3, 3), torch.randn(2)
    offset, mask = torch.randn(2, 18, 8, 10, requires_grad=True), torch.rand(2, 9, 8, 10)
    y = modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1, 1, 1, 1)
    parts = []
    for image, o, m in zip(x, offset, mask, strict=True):
        first = o.flatten()[: 18 * 20].view(1, 18, 4, 5), m.flatten()[: 9 * 20].view(1, 9, 4, 5)
        parts.append(torchvision.ops.deform_conv2d(image[None], first[0], weight, bias, 1, 1, 1, first[1]))
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected)
    (got,) = torch.autograd.grad(y.sum(), offset)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), offset)[0])
    assert not got.flatten(1)[:, 18 * 20 :].any()


def sampled(y: Any, row: float, column: float) -> Any:
    """Bilinear, zero outside; ``y`` ``(H, W, C)``."""
    height, width = y.shape[:2]
    top, left = int(row // 1), int(column // 1)
    total = torch.zeros_like(y[0, 0])
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < height and 0 <= j < width:
                total = total + (1 - abs(row - i)) * (1 - abs(column - j)) * y[i, j]
    return total


def test_deformable_attention_and_its_gradients() -> None:
    """A GPU's path of ``MultiScaleDeformableAttention``, which calls the operator; on a CPU mmcv leaves it out."""
    operators.install()
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    generator = torch.Generator().manual_seed(0)
    shapes, heads, channels, queries, points = [(3, 4), (2, 2)], 2, 3, 3, 2
    value = torch.randn(2, 16, heads, channels, generator=generator, dtype=torch.double)
    where = torch.rand(2, queries, heads, 2, points, 2, generator=generator, dtype=torch.double) * 1.4 - 0.2
    weights = torch.rand(2, queries, heads, 2, points, generator=generator, dtype=torch.double)
    tensors = [t.requires_grad_() for t in (value, where, weights)]

    def attention(value: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor([0, 12])
        return MultiScaleDeformableAttnFunction.apply(value, torch.tensor(shapes), starts, where, weights, 64)

    y = attention(*tensors)
    for n in range(2):
        for q in range(queries):
            for h in range(heads):
                expected = torch.zeros(channels, dtype=torch.double)
                for level, ((height, width), start) in enumerate(zip(shapes, (0, 12), strict=True)):
                    part = value[n, start : start + height * width, h].view(height, width, channels)
                    for p in range(points):
                        column, row = (where[n, q, h, level, p] * torch.tensor([width, height]) - 0.5).tolist()
                        expected = expected + weights[n, q, h, level, p] * sampled(part, row, column)
                torch.testing.assert_close(y[n, q].view(heads, channels)[h], expected)
    assert torch.autograd.gradcheck(attention, tensors, eps=1e-6, atol=1e-5)
