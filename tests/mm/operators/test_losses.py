"""Focal losses and their gradients against formulas and torchvision."""

import pytest
import torch
import torchvision

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
operators = pytest.importorskip("revnets.mm.operators", reason=REASON, exc_type=ImportError)


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
