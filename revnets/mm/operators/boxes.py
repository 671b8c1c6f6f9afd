"""Operators on boxes: which of those that overlap stay."""

import torch
import torchvision
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices ``(K,)`` of the boxes ``(N, 4)`` kept, best first; with ``offset`` 1, boxes include their last pixel."""
    boxes = boxes.float()
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return torchvision.ops.nms(boxes, scores.float(), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    r"""Scores of overlapping boxes decay instead of vanishing (Bodla et al., arXiv 1704.04503).

    The best box is taken, every other's score is multiplied by a weight of their IoU o, and those below ``min_score``
    are dropped; and so on with the rest. Weights: 0 or :math:`1 - o` where o reaches the threshold (methods 0 and 1),
    :math:`e^{-o^2 / \sigma}` (method 2).

    Args:
        boxes: ``(N, 4)``.
        scores: ``(N,)``.
        dets: ``(N, 5)``, where the K kept boxes and their final scores are written.
        iou_threshold: of methods 0 and 1.
        sigma: of method 2.
        min_score: below it a box is dropped.
        method: 0, 1 or 2.
        offset: 1 if boxes include their last pixel.

    Returns:
        indices ``(K,)``, best first.
    """
    left = torch.arange(len(boxes), device=boxes.device)
    scores = scores.clone()
    kept: list[Tensor] = []
    while len(left):
        position = int(scores[left].argmax())
        best = left[position]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left = torch.cat((left[:position], left[position + 1 :]))
        overlap = _iou(boxes[best], boxes[left], offset)
        if method == 2:
            weight = torch.exp(-overlap.square() / sigma)
        else:
            weight = torch.where(overlap >= iou_threshold, 1 - overlap if method == 1 else 0.0, 1.0)
        scores[left] *= weight
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes ``(N, 5)`` with scores: each that stays, and those that it removes, best first.

    A box is removed where its IoU with a better one that stays reaches the threshold.
    """
    boxes, left = dets[:, :4], dets[:, 4].argsort(descending=True)
    groups = []
    while len(left):
        best, left = left[0], left[1:]
        matched = _iou(boxes[best], boxes[left], 0) >= iou_threshold
        groups.append([int(best), *left[matched].tolist()])
        left = left[~matched]
    return groups


def _iou(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset).clamp_(min=0)
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    common = sides.prod(1)
    return common / ((box[2:] - box[:2] + offset).prod() + areas - common)
