"""Lean layers have the values, gradients and statistics of the modules they stand for, with fewer tensors kept."""

import copy
from collections.abc import Callable
from typing import Any

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


CONVS: dict[str, dict[str, Any]] = {
    "depthwise": {"groups": 8, "padding": 1},
    "depthwise, twice as wide": {"groups": 8, "out_channels": 16, "padding": 1},
    "depthwise, strided": {"groups": 8, "stride": 2, "padding": 1},
    "depthwise, unequal strides": {"groups": 8, "stride": (1, 2), "padding": (1, 0)},
    "depthwise, unequal strides and padding": {"groups": 8, "stride": (3, 1), "padding": (0, 2)},
    "depthwise, dilated": {"groups": 8, "dilation": 2, "padding": 2},
    "depthwise, unequal dilation": {"groups": 8, "dilation": (1, 2), "padding": 1},
    "depthwise, large": {"groups": 8, "kernel_size": 5, "padding": 2},
    "depthwise, large and strided": {"groups": 8, "kernel_size": 5, "stride": (2, 3), "padding": 2},
    "depthwise, oblong": {"groups": 8, "kernel_size": (3, 5), "padding": (1, 2)},
    "grouped, unequal strides": {"groups": 2, "stride": (2, 1), "padding": (0, 1)},
    "dense, unequal strides": {"stride": (1, 2), "dilation": (2, 1), "padding": (2, 0)},
    "pointwise": {"kernel_size": 1},
}


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "half of a tensor"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_have_torchs_gradients(name: str, bias: bool, layout: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, "bias": bias, **CONVS[name]}).double()
    found = []
    for lean in (True, False):
        x = torch.randn(2, 16, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        given = x[:, :8] if layout == "half of a tensor" else x[:, :8].contiguous()
        given = given.contiguous(memory_format=torch.channels_last) if layout == "channels last" else given
        y = conv(given, layer) if lean else layer(given)
        found.append([y, *torch.autograd.grad(loss(y), [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONVS)
def test_gradients_under_autocast_have_the_types_of_their_tensors(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, **CONVS[name]})
    found = []
    for lean in (True, False):
        x = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = conv(x, layer) if lean else layer(x)
        grads = torch.autograd.grad(loss(y.float()), [x, *layer.parameters()])
        assert y.dtype == torch.bfloat16
        assert {g.dtype for g in grads} == {torch.float32}
        found.append([y, *grads])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_are_torchs(momentum: float | None) -> None:
    """Without a momentum they are means over all batches so far."""
    norms = [nn.BatchNorm2d(6, momentum=momentum).double() for _ in range(2)]
    for seed in range(3):
        x = torch.randn(3, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(norm_act(x, norms[0]), norms[1](x))
        for name, buffer in norms[0].named_buffers():
            assert torch.allclose(buffer, dict(norms[1].named_buffers())[name]), name


@pytest.mark.parametrize("act", [a for a in ACTS if a is not None])
def test_activations_where_they_bend(act: type[nn.Module]) -> None:
    """Values just beside the bends, where a gradient may jump."""
    values = torch.tensor(
        [1e-9, -1e-9, 5e-4, -5e-4, 2.0, 3.0001, -3.0001, 2.9999, -2.9999, 6.0, -8.0], dtype=torch.float64
    )
    x = torch.cat([values, -values.sum()[None]]).view(1, 1, 4, 3)
    found = []
    for lean in (True, False):
        norm, bends = nn.BatchNorm2d(1, eps=1e-12).double(), act()
        with torch.no_grad():  # so that the activation reads x itself
            norm.weight.copy_(x.std(unbiased=False)[None])
        given = x.clone().requires_grad_()
        y = norm_act(given, norm, bends) if lean else bends(norm(given))
        found.append([y, torch.autograd.grad((y * torch.arange(1.0, 13.0).view_as(y)).sum(), given)[0]])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


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
