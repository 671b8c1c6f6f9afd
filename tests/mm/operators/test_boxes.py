"""Which boxes stay: by brute force, and through ``mmcv.ops``."""

import math

import pytest
import torch
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


def test_batched_nms_keeps_classes_apart() -> None:
    operators.install()
    from mmcv.ops import batched_nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [1, 1, 10, 10]])
    dets, kept = batched_nms(
        boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), {"type": "nms", "iou_threshold": 0.5}
    )
    assert kept.tolist() == [0, 1]
    assert dets.shape == (2, 5)


def test_nms_match_by_brute_force() -> None:
    operators.install()
    from mmcv.ops import nms_match

    boxes, scores = boxes_and_scores()
    left, expected = scores.argsort(descending=True).tolist(), []
    while left:
        expected.append([i for i in left if i == left[0] or iou(boxes[left[0]], boxes[i], 0) >= 0.4])
        left = [i for i in left if i not in expected[-1]]
    found = nms_match(torch.cat((boxes, scores[:, None]), dim=1), 0.4)
    assert [group.tolist() for group in found] == expected
    assert max(map(len, expected)) > 1


@pytest.mark.parametrize(("threshold", "removed"), [(0.5, True), (0.5000001, False)])
def test_nms_match_at_the_threshold(threshold: float, removed: bool) -> None:
    dets = torch.tensor([[0.0, 0.0, 2.0, 1.0, 0.5], [0.0, 0.0, 2.0, 2.0, 0.75]])
    assert operators.nms_match(dets, threshold) == ([[1, 0]] if removed else [[1], [0]])
