"""A stand-in for mmcv's compiled operators: what detectors need, by torchvision's kernels and plain torch.

``mmcv.ops`` calls functions of an extension module ``mmcv._ext`` that write into tensors they are given. Where a
compiled one is installed it is used; otherwise ``install`` puts the functions below, with mmcv's signatures, in its
place.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

NAME = "mmcv._ext"


def install() -> bool:
    """Put the stand-in where ``mmcv.ops`` looks, unless a compiled extension is there.

    Returns:
        whether the stand-in is in use.

    Raises:
        ImportError: when mmcv is not installed.
    """
    if NAME in sys.modules:
        return isinstance(sys.modules[NAME], _StandIn)
    if importlib.util.find_spec("mmcv") is None:
        raise ImportError("revnets.mm needs MMDetection: pip install 'revnets[detection]'")
    if importlib.util.find_spec(NAME) is not None:
        return False
    sys.modules[NAME] = _StandIn(NAME)
    return True


class MissingOperatorError(NotImplementedError):
    """An operator of mmcv that has no stand-in was called."""


class _StandIn(ModuleType):
    """Has every name; those without an implementation raise when they are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name, __doc__)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=__file__)
        self.__file__ = __file__
        self.__dict__.update(OPERATORS)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            raise MissingOperatorError(
                f"mmcv operator {name!r} needs mmcv's compiled extension, which is not installed: install an mmcv "
                f"built with operators for torch {torch.__version__}; without one, there are {', '.join(OPERATORS)}"
            )

        return missing


# --- boxes -----------------------------------------------------------------------------------------------------------


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


def _iou(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2]) + offset).clamp_(min=0)
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    common = sides.prod(1)
    return common / ((box[2:] - box[:2] + offset).prod() + areas - common)


# --- regions ---------------------------------------------------------------------------------------------------------


def _average_only(pool_mode: int) -> None:
    if pool_mode != 1:
        raise MissingOperatorError(
            "RoIAlign with pool_mode='max' needs mmcv's compiled extension; without one use pool_mode='avg'"
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Bilinear means over cells of ``rois`` ``(K, 5)``, into ``output`` ``(K, C, h, w)``."""
    _average_only(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(
            _wide(input), rois.to(_wide(input).dtype), size, spatial_scale, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The transpose of ``roi_align_forward``, into ``grad_input`` ``(N, C, H, W)``."""
    _average_only(pool_mode)
    grad = _wide(grad_output)
    size = (aligned_height, aligned_width, *grad_input.shape)
    kernel = torch.ops.torchvision._roi_align_backward
    grad_input.copy_(kernel(grad, rois.to(grad.dtype), spatial_scale, *size, sampling_ratio, aligned))


def _wide(x: Tensor) -> Tensor:
    """torchvision's kernels know no bfloat16, and half precision would lose pixels of a box."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# --- focal loss ------------------------------------------------------------------------------------------------------


def _sigmoid_focal_loss(x: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    positive = target[:, None] == torch.arange(x.shape[1], device=x.device)
    p = x.sigmoid()
    loss = torch.where(
        positive, -alpha * (1 - p) ** gamma * F.logsigmoid(x), -(1 - alpha) * p**gamma * F.logsigmoid(-x)
    )
    if weight.numel():  # of the sample's class; the background, counted last, has none of its own
        loss = loss * torch.cat((weight, weight.new_ones(1)))[target][:, None]
    return loss


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    r"""Focal loss of logits ``(N, C)`` and classes ``(N,)``, C for background (Lin et al., arXiv 1708.02002).

    .. math:: -\alpha (1 - p)^\gamma \log p \text{ at the class}, \qquad -(1 - \alpha) p^\gamma \log(1 - p)
       \text{ elsewhere}
    """
    output.copy_(_sigmoid_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Its derivative at each logit, into ``grad_input``."""
    (grad,) = _grads([input], [True], lambda x: _sigmoid_focal_loss(x, target, weight, gamma, alpha))
    grad_input.copy_(grad)


def _at_target(softmax: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The target's probability, and the sample's weight: 0 where there is no target."""
    index = target.clamp(min=0)
    factor = (target >= 0).to(softmax.dtype)
    if weight.numel():
        factor = factor * weight[index]
    return softmax.gather(1, index[:, None]).squeeze(1).clamp(min=torch.finfo(torch.float32).tiny), factor


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    r""":math:`-\alpha (1 - p)^\gamma \log p` at the class, from probabilities ``(N, C)``; 0 for negative classes."""
    p, factor = _at_target(softmax, target, weight)
    output.copy_(-alpha * factor * (1 - p) ** gamma * p.log())


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    r"""Its derivative at each logit: :math:`p \, \partial_p loss \, (\delta_{c,t} - p_c)`."""
    p, factor = _at_target(softmax, target, weight)
    rest = (1 - p).clamp(min=torch.finfo(torch.float32).tiny)
    buff.copy_(alpha * factor * (gamma * rest ** (gamma - 1) * p * p.log() - (1 - p) ** gamma))
    delta = F.one_hot(target.clamp(min=0), softmax.shape[1]).to(softmax.dtype)
    grad_input.copy_(buff[:, None] * (delta - softmax))


# --- deformable convolution ------------------------------------------------------------------------------------------


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: Any
) -> None:
    """Convolution at shifted positions (Dai et al., arXiv 1703.06211), into ``output``."""
    output.copy_(_deform(geometry)(input, offset, weight))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """Gradients of input and offsets."""
    found = _grads([input, offset, weight], [True, True, False], _deform(geometry), grad_output)
    grad_input.copy_(found[0])
    grad_offset.copy_(found[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float = 1,
    **geometry: Any,
) -> None:
    """Gradient of the weight, added ``scale`` times to ``grad_weight``."""
    (found,) = _grads([input, offset, grad_weight], [False, False, True], _deform(geometry), grad_output)
    grad_weight.add_(found, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """The same with a factor for each position (Zhu et al., arXiv 1811.11168)."""
    output.copy_(_deform(geometry)(input, offset, weight, mask, bias))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **geometry: Any,
) -> None:
    """All its gradients."""
    tensors = [input, offset, weight, mask, bias]
    needed = [True, True, True, True, bool(geometry["with_bias"])]
    targets = (grad_input, grad_offset, grad_weight, grad_mask, grad_bias)
    for target, found in zip(targets, _grads(tensors, needed, _deform(geometry), grad_output), strict=False):
        target.copy_(found)


def _deform(geometry: dict[str, Any]) -> Callable[..., Tensor]:
    """torchvision's convolution with mmcv's arguments, which name height and width in two ways."""
    plain = "dH" in geometry
    names = ("dH", "dW", "padH", "padW", "dilationH", "dilationW")
    modulated = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    values = [geometry[name] for name in (names if plain else modulated)]
    with_bias = not plain and geometry["with_bias"]

    def convolve(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None, bias: Any = None) -> Tensor:
        sizes = (tuple(values[:2]), tuple(values[2:4]), tuple(values[4:]))
        return torchvision.ops.deform_conv2d(input, offset, weight, bias if with_bias else None, *sizes, mask)

    return convolve


def _grads(
    tensors: Sequence[Tensor], needed: Sequence[bool], function: Callable[..., Tensor], grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of the needed tensors through ``function``, computed again."""
    inputs = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
    with torch.enable_grad():
        y = function(*inputs)
    return torch.autograd.grad(y, [t for t in inputs if t.requires_grad], torch.ones_like(y) if grad is None else grad)


OPERATORS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        softmax_focal_loss_forward,
        softmax_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
    )
}
"""By mmcv's names."""
