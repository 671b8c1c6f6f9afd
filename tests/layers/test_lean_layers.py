"""Lean layers have the values, gradients and statistics of the modules they stand for, with fewer tensors kept."""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.layers import SEModule
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revnets.layers import MBConv, conv, norm_act, norm_act_conv
from tests.helpers import assert_same_step, training_step

ACTS: list[type[nn.Module] | None] = [None, nn.Hardswish, nn.SiLU, nn.ReLU, nn.GELU]


class Lean(nn.Module):
    """norm, act, (optionally) squeeze-and-excite, convolution; ``plain`` calls the modules, not the lean functions."""

    def __init__(self, act: type[nn.Module] | None, se: bool, plain: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)
        self.act = None if act is None else act()
        self.se = SEModule(6, rd_channels=3) if se else None
        self.conv = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        if not self.plain:
            if self.act is None:
                return conv(norm_act(x, self.norm), self.conv)
            return norm_act_conv(x, self.norm, self.act, self.se, self.conv)
        x = self.norm(x)
        x = x if self.act is None else self.act(x)
        return self.conv(x if self.se is None else self.se(x))


def pair(act: type[nn.Module] | None, se: bool) -> tuple[Lean, Lean]:
    return Lean(act, se, plain=False).double(), Lean(act, se, plain=True).double()


def image() -> Tensor:
    return torch.randn(3, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loss(y: Tensor) -> Tensor:
    return (y**3).mean()


CASES = [(act, False) for act in ACTS] + [(act, True) for act in ACTS if act is not None]


@pytest.mark.parametrize(("act", "se"), CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_modules(act: type[nn.Module] | None, se: bool, memory_format: torch.memory_format) -> None:
    lean, plain = pair(act, se)
    x = image().to(memory_format=memory_format)
    assert_same_step(training_step(lean, (x,), loss), training_step(plain, (x,), loss), 1e-10)
    assert torch.allclose(lean.eval()(x), plain.eval()(x), rtol=1e-12)


@pytest.mark.parametrize(("act", "se"), CASES)
def test_second_derivatives(act: type[nn.Module] | None, se: bool) -> None:
    results = []
    for model in pair(act, se):
        x = image().requires_grad_()
        (grad,) = torch.autograd.grad(loss(model(x)), x, create_graph=True)
        grad.square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-8, atol=1e-14)  # type: ignore[arg-type]


def kept_maps(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Number of distinct tensors of x's size that autograd keeps."""
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    return sum(n == x.numel() for n in kept.values()) + 0 * len(y)


def test_one_tensor_is_kept() -> None:
    x = image().requires_grad_()
    lean, plain = pair(nn.Hardswish, True)
    assert kept_maps(lean, x) == 1
    assert kept_maps(plain, x) == 4


@pytest.mark.parametrize(
    "what", ["norm hook", "frozen norm", "eval norm", "no affine", "se parameter hook", "conv hook"]
)
def test_anything_unusual_takes_the_plain_path(what: str) -> None:
    lean, plain = pair(nn.Hardswish, True)
    for model in (lean, plain):
        assert model.se is not None
        if what == "norm hook":
            model.norm.register_forward_hook(lambda m, i, o: o * 2)
        elif what == "frozen norm":
            model.norm.requires_grad_(False)
        elif what == "eval norm":
            model.norm.eval()
        elif what == "no affine":
            model.norm = nn.BatchNorm2d(6, affine=False).double()
        elif what == "conv hook":
            model.conv.register_forward_hook(lambda m, i, o: o * 2)
        else:
            model.se.fc1.weight.register_hook(lambda g: g * 2)
    assert_same_step(training_step(lean, (image(),), loss), training_step(plain, (image(),), loss), 1e-10)


@pytest.mark.parametrize(("exp_ratio", "se_ratio", "stride"), [(1, 0.25, 1), (2, 0.25, 2), (2, 0, 1), (1, 0, 2)])
def test_mbconv_shapes_and_options(exp_ratio: float, se_ratio: float, stride: int) -> None:
    block = MBConv(8, 6, 3, stride, exp_ratio, se_ratio, drop_path_rate=0.5)
    assert block(torch.randn(2, 8, 8, 8)).shape == (2, 6, 8 // stride, 8 // stride)
    assert (block.conv_pw is None) == (exp_ratio == 1)
    assert (block.se is None) == (se_ratio == 0)
    copy.deepcopy(block)


def test_a_single_value_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(1, 6, 1, 1\).*norm.eval"):
        norm_act(torch.ones(1, 6, 1, 1), nn.BatchNorm2d(6))
