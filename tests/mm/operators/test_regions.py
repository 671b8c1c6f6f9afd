"""Pooled regions against torchvision, through ``mmcv.ops``."""

import pytest
import torch
import torchvision

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
operators = pytest.importorskip("revnets.mm.operators", reason=REASON, exc_type=ImportError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roi_align_and_its_gradient(dtype: torch.dtype) -> None:
    operators.install()
    from mmcv.ops import RoIAlign

    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16).to(dtype)
    rois = torch.tensor([[0, 1.0, 2.0, 20.0, 28.0], [1, 4.0, 4.0, 30.0, 18.0]])
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    y = RoIAlign((7, 5), 0.5, 2)(mine, rois.to(dtype))
    expected = torchvision.ops.roi_align(theirs.float(), rois, (7, 5), 0.5, 2, aligned=True).to(dtype)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
