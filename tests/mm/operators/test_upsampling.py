"""CARAFE and masked convolution against their formulas, through ``mmcv.ops`` and the modules of MMDetection."""

import pytest
import torch
from torch import Tensor

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
operators = pytest.importorskip("revnets.mm.operators", reason=REASON, exc_type=ImportError)


def reassembled(x: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    """The formula, pixel by pixel."""
    n, channels, height, width = x.shape
    y = x.new_zeros(n, channels, height * scale, width * scale)
    for c in range(channels):
        group = c // (channels // groups)
        for row in range(height * scale):
            for column in range(width * scale):
                for i in range(kernel):
                    for j in range(kernel):
                        r, s = row // scale + i - kernel // 2, column // scale + j - kernel // 2
                        if 0 <= r < height and 0 <= s < width:
                            weight = masks[:, (group * kernel + i) * kernel + j, row, column]
                            y[:, c, row, column] += weight * x[:, c, r, s]
    return y


@pytest.mark.parametrize(("kernel", "groups", "scale"), [(3, 1, 2), (5, 2, 1), (1, 2, 3)])
def test_carafe_and_its_gradients(kernel: int, groups: int, scale: int) -> None:
    operators.install()
    from mmcv.ops import carafe, carafe_naive

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.double)
    masks = torch.rand(2, groups * kernel**2, 3 * scale, 2 * scale, generator=generator, dtype=torch.double)
    expected = reassembled(x, masks, kernel, groups, scale)
    for operator in (carafe, carafe_naive):
        torch.testing.assert_close(operator(x, masks, kernel, groups, scale), expected)

    def upsample(x: Tensor, masks: Tensor) -> Tensor:
        return carafe(x, masks, kernel, groups, scale)

    assert torch.autograd.gradcheck(upsample, [x.requires_grad_(), masks.requires_grad_()])


def test_carafe_of_a_neck() -> None:
    """Weights that the module normalises: a constant map stays constant away from the border."""
    operators.install()
    from mmcv.ops.carafe import CARAFEPack

    torch.manual_seed(0)
    y = CARAFEPack(8, 2, compressed_channels=4)(torch.full((1, 8, 9, 9), 3.0))
    assert y.shape == (1, 8, 18, 18)
    torch.testing.assert_close(y[:, :, 4:-4, 4:-4], torch.full((1, 8, 10, 10), 3.0))


@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), (1, 1)), ((3, 5), (1, 2)), ((1, 1), (0, 0))])
def test_masked_convolution(kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    operators.install()
    from mmcv.ops import MaskedConv2d

    torch.manual_seed(0)
    convolution = MaskedConv2d(3, 4, kernel, padding=padding)
    x, mask = torch.randn(1, 3, 6, 7), torch.rand(1, 6, 7) > 0.6
    with torch.no_grad():
        y, everywhere, nowhere = convolution(x, mask), convolution(x), convolution(x, mask & False)
    torch.testing.assert_close(y, torch.where(mask, everywhere, 0.0))
    assert not nowhere.any()
