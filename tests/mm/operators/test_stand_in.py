"""Operators without mmcv's extension: against formulas, torchvision and brute force, and through ``mmcv.ops``."""

import math
import sys
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
operators = pytest.importorskip("revnets.mm.operators", reason=REASON, exc_type=ImportError)


def boxes_and_scores(n: int = 40) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    corners = torch.rand(n, 2) * 20
    return torch.cat((corners, corners + 2 + torch.rand(n, 2) * 10), dim=1), torch.rand(n)


def iou(a: Tensor, b: Tensor, offset: int) -> float:
    width = max(0.0, float(min(a[2], b[2]) - max(a[0], b[0])) + offset)
    height = max(0.0, float(min(a[3], b[3]) - max(a[1], b[1])) + offset)
    areas = [float((t[2] - t[0] + offset) * (t[3] - t[1] + offset)) for t in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_by_brute_force(offset: int) -> None:
    boxes, scores = boxes_and_scores()
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i], boxes[j], offset) <= 0.4 for j in kept):
            kept.append(i)
    assert operators.nms(boxes, scores, 0.4, offset).tolist() == kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", [0, 1, 2])
def test_soft_nms_by_brute_force(method: int, offset: int) -> None:
    boxes, scores = boxes_and_scores(20)
    dets, left, expected = torch.zeros(20, 5), {i: float(s) for i, s in enumerate(scores)}, []
    found = operators.softnms(boxes, scores, dets, 0.3, 0.5, 0.05, method, offset)
    while left:
        best = max(left, key=lambda i: left[i])
        expected.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 2:
                left[i] *= math.exp(-(overlap**2) / 0.5)
            elif overlap >= 0.3:
                left[i] *= 1 - overlap if method == 1 else 0
            if left[i] < 0.05:
                del left[i]
    assert found.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(dets[: len(found), 4], torch.tensor([s for _, s in expected]))
    assert torch.equal(dets[: len(found), :4], boxes[found])


@pytest.mark.parametrize(("method", "weight"), [(0, 0.0), (1, 0.5)])
@pytest.mark.parametrize(("threshold", "decays"), [(0.5, True), (0.5000001, False)])
def test_overlap_at_the_threshold(method: int, weight: float, threshold: float, decays: bool) -> None:
    """IoU of a half to the bit: soft NMS counts it as reached, hard NMS keeps what does not exceed it."""
    boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]]), torch.tensor([0.75, 0.5])
    dets = torch.zeros(2, 5)
    found = operators.softnms(boxes, scores, dets, threshold, 0.5, 0.1, method, 0)
    rest = 0.5 * (weight if decays else 1.0)
    assert dets[: len(found), 4].tolist() == ([0.75, rest] if rest >= 0.1 else [0.75])
    assert operators.nms(boxes, scores, threshold, 0).tolist() == [0, 1]
    assert operators.nms(boxes, scores, 0.4999, 0).tolist() == [0]


@pytest.mark.parametrize("least", [0.25, 0.2500001])
def test_score_at_the_least(least: float) -> None:
    boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]]), torch.tensor([0.75, 0.5])
    found = operators.softnms(boxes, scores, torch.zeros(2, 5), 0.5, 0.5, least, 1, 0)
    assert found.tolist() == ([0, 1] if least == 0.25 else [0])


def test_nothing_in_nothing_out() -> None:
    none, no_scores = torch.zeros(0, 4), torch.zeros(0)
    assert operators.nms(none, no_scores, 0.5, 0).shape == (0,)
    assert operators.softnms(none, no_scores, torch.zeros(0, 5), 0.5, 0.5, 0.1, 1, 0).shape == (0,)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(gamma: float, weighted: bool) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(6, 3, dtype=torch.double, requires_grad=True), torch.tensor([0, 1, 2, 3, 3, 1])
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.double) if weighted else torch.empty(0, dtype=torch.double)
    one_hot = torch.nn.functional.one_hot(target, 4)[:, :3].double()
    expected = torchvision.ops.sigmoid_focal_loss(x, one_hot, alpha=0.25, gamma=gamma)
    if weighted:
        expected = expected * torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.double)[target][:, None]
    loss, grad = torch.zeros_like(x), torch.zeros_like(x)
    operators.sigmoid_focal_loss_forward(x.detach(), target, weight, loss, gamma=gamma, alpha=0.25)
    operators.sigmoid_focal_loss_backward(x.detach(), target, weight, grad, gamma=gamma, alpha=0.25)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_focal_loss_of_extreme_logits_is_finite() -> None:
    x, target = torch.tensor([[200.0, -200.0]]), torch.tensor([1])
    for function in (operators.sigmoid_focal_loss_forward, operators.sigmoid_focal_loss_backward):
        result = torch.zeros_like(x)
        function(x, target, torch.empty(0), result, gamma=2.0, alpha=0.25)
        assert result.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_softmax_focal_loss(gamma: float) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(5, 3, dtype=torch.double, requires_grad=True), torch.tensor([0, 2, 1, -1, 2])
    p = x.softmax(1)
    at = p.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    expected = torch.where(target >= 0, -0.25 * (1 - at) ** gamma * at.log(), 0.0)
    loss, buff, grad = torch.zeros(5).double(), torch.zeros(5).double(), torch.zeros_like(x)
    empty = torch.empty(0).double()
    operators.softmax_focal_loss_forward(p.detach(), target, empty, loss, gamma=gamma, alpha=0.25)
    operators.softmax_focal_loss_backward(p.detach(), target, empty, buff, grad, gamma=gamma, alpha=0.25)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


# --- through mmcv ----------------------------------------------------------------------------------------------------


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


def test_batched_nms_keeps_classes_apart() -> None:
    operators.install()
    from mmcv.ops import batched_nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [1, 1, 10, 10]])
    dets, kept = batched_nms(
        boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), {"type": "nms", "iou_threshold": 0.5}
    )
    assert kept.tolist() == [0, 1]
    assert dets.shape == (2, 5)


def test_other_operators_say_what_is_missing() -> None:
    if not operators.install():
        pytest.skip("a compiled mmcv is installed")
    from mmcv.ops import nms_rotated

    with pytest.raises(operators.MissingOperatorError, match=r"mmcv operator 'nms_rotated' needs mmcv's compiled"):
        nms_rotated(torch.rand(3, 5), torch.rand(3), 0.5)
    with pytest.raises(operators.MissingOperatorError, match="pool_mode"):
        operators.roi_align_forward(*[torch.zeros(1)] * 5, 1, 1, 1.0, 0, pool_mode=0, aligned=True)


def test_a_compiled_extension_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "NAME", "json")  # stands for any extension that is there
    monkeypatch.delitem(sys.modules, "json")
    assert operators.install() is False
