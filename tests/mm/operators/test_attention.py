"""Masks of point-wise attention against their formula, through ``mmcv.ops``."""

import pytest
import torch
from torch import Tensor

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
operators = pytest.importorskip("revnets.mm.operators", reason=REASON, exc_type=ImportError)


def placed(masks: Tensor, collect: bool, size: tuple[int, int]) -> Tensor:
    """The formula, weight by weight."""
    n, _, height, width = masks.shape
    y = masks.new_zeros(n, height * width, height, width)
    for row in range(height):
        for column in range(width):
            for i in range(size[0]):
                for j in range(size[1]):
                    r, s = row + i - (size[0] - 1) // 2, column + j - (size[1] - 1) // 2
                    if 0 <= r < height and 0 <= s < width:
                        weight = masks[:, i * size[1] + j, row, column]
                        if collect:
                            y[:, r * width + s, row, column] = weight
                        else:
                            y[:, row * width + column, r, s] = weight
    return y


@pytest.mark.parametrize("kind", ["collect", "distribute"])
@pytest.mark.parametrize("size", [(3, 3), (5, 3), (2, 4), (9, 9)])
def test_masks_and_their_gradients(kind: str, size: tuple[int, int]) -> None:
    operators.install()
    from mmcv.ops import PSAMask

    masks = torch.randn(2, size[0] * size[1], 3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    place = PSAMask(kind, size)
    torch.testing.assert_close(place(masks), placed(masks, kind == "collect", size), rtol=0, atol=0)
    assert torch.autograd.gradcheck(place, [masks.requires_grad_()])


@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_a_number_that_is_not_finite_stays_where_it_is(kind: str) -> None:
    operators.install()
    from mmcv.ops import PSAMask

    masks = torch.ones(1, 9, 3, 3)
    masks[:, 0] = float("inf")
    assert torch.equal(PSAMask(kind, (3, 3))(masks), placed(masks, kind == "collect", (3, 3)))
