"""Focal losses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import gradients


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
    (grad,) = gradients([input], [True], lambda x: _sigmoid_focal_loss(x, target, weight, gamma, alpha))
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
