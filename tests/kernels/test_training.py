"""The kernel in training: gradients against float64, and networks that train as on the masked path."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SEModule
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import revnets
from revnets.kernels import layouts
from revnets.kernels.build import KernelUnavailable
from revnets.kernels.training import Structure, sparse_conv
from revnets.layers import SparseConv2d, SparseLinear, convert, norm_act_conv, use_sparse_kernel
from revnets.reversible import AdditiveCoupling, RevSequential
from revnets.sparsity import SparsityController

from .nets import assert_close, images, layer, needs_kernel, step

# --- the function ----------------------------------------------------------------------------------------------------


@needs_kernel
@settings(max_examples=80, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    bias=st.booleans(),
    layouts=st.tuples(*[st.sampled_from([torch.contiguous_format, torch.channels_last])] * 2),
    seed=st.integers(0, 99),
)
def test_gradients(channels: Any, size: Any, sparsity: float, bias: bool, layouts: Any, seed: int) -> None:
    """Planes smaller than a vector, one pixel, several blocks; rows and columns without weights; no weights at all."""
    inputs, outputs, groups = channels
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(outputs * groups, inputs, 1, 1, generator=generator) >= sparsity
    mask[:, 0] = False
    operands = [torch.randn(size[0], inputs * groups, *size[1:], generator=generator).to(memory_format=layouts[0])]
    operands += [torch.randn(mask.shape, generator=generator)]
    operands += [torch.randn(len(mask), generator=generator)] if bias else []
    ours = [t.clone().requires_grad_() for t in operands]
    theirs = [t.double().requires_grad_() for t in operands]
    y = sparse_conv(ours[0], ours[1], ours[2] if bias else None, Structure(mask, groups))
    expected = F.conv2d(theirs[0], theirs[1] * mask, theirs[2] if bias else None, groups=groups)
    dy = torch.randn(y.shape, generator=generator).to(memory_format=layouts[1])
    y.backward(dy)
    expected.backward(dy.double())
    assert_close([y, *(t.grad for t in ours)], [expected, *(t.grad for t in theirs)])  # type: ignore[misc]
    assert not ours[1].grad[~mask].any()  # type: ignore[index]


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 150))
def test_transposed(height: int, width: int) -> None:
    x = torch.randn(height, width)
    assert torch.equal(layouts.transposed(x), x.t())


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(
    channels=st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(1, 3)),
    chunks=st.integers(0, 2),
    size=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(2, 12)),
)
def test_layouts_do_not_change_a_bit(channels: Any, chunks: int, size: Any) -> None:
    """Reversible networks may compute a layer again in the other. Blocks of one vector and of more add alike."""
    inputs, outputs, groups = channels
    torch.manual_seed(0)
    structure = Structure(torch.rand(outputs * groups, inputs + 130 * chunks, 1, 1) < 0.3, groups)
    values, bias = torch.randn(len(structure.places)), torch.randn(outputs * groups)
    x = torch.randn(size[0], structure.geometry.in_channels, *size[1:])
    dy, found = torch.randn(size[0], outputs * groups, *size[1:]), []
    shape = torch.Size((outputs * groups, inputs + 130 * chunks, 1, 1))
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        y = structure.convolve(given, values, bias)
        assert y.is_contiguous(memory_format=layout)
        grads = structure.grads(dy.contiguous(memory_format=layout), given, values, shape, (True, True, True))
        found.append((y, *grads))
    for ours, others in zip(*found, strict=True):
        assert ours is not None
        assert torch.equal(ours, others)


@needs_kernel
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [1, 5])
def test_some_channels_of_images_are_laid_out_as_these(layout: torch.memory_format, side: int) -> None:
    """Halves, such as couplings read: else maps change their layout on the way, and a network's modes their bits."""
    made = layer(8, 24)
    x = images(2, 16, side).contiguous(memory_format=layout)[:, 8:]
    found = step(made, x)
    y = made(x)
    assert y.stride() == nn.functional.conv2d(x, made.weight, made.bias).stride()
    made.sparse_kernel = False
    assert_close(found, step(made, x))


@needs_kernel
def test_nothing_is_transposed_between_pointwise_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_transpose", lambda *args: pytest.fail("a copy in the other layout"))
    net = nn.Sequential(layer(16, 24), nn.BatchNorm2d(24), nn.ReLU(), layer(24, 16))
    step(net, images().to(memory_format=torch.channels_last))


@needs_kernel
@pytest.mark.parametrize("shape", [(12,), (1, 12), (50, 12), (2, 3, 17, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(calls: list[torch.Size], shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    made, x = SparseLinear(12, 20, bias=bias, sparsity=0.75), torch.randn(shape)
    expected = step(copy.deepcopy(made).double(), x.double())
    assert use_sparse_kernel(made) == 1
    assert_close(step(made, x), expected)
    assert_close(step(made, x.mT.contiguous().mT) if x.ndim > 1 else [], expected if x.ndim > 1 else [])
    assert [math.prod(s) for s in calls] == [x.numel()] * (1 + (x.ndim > 1))


@needs_kernel
@pytest.mark.parametrize("inputs", [128, 300, 700])
@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_in_chunks(inputs: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    made = SparseConv2d(inputs, 260, 1, sparsity=0.9)
    x = torch.randn(3, inputs, 7, 7)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    expected = step(copy.deepcopy(made).double(), x.double())
    use_sparse_kernel(made)
    assert_close(step(made, x), expected)


@needs_kernel
@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_threads_do_not_change_gradients(side: int, batch: int, groups: int) -> None:
    made, x = layer(32, 48, groups=groups), images(batch, 32, side)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(step(made, x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernel
def test_only_what_is_needed_is_computed() -> None:
    made, x = layer(), images()
    made.weight.requires_grad_(False)
    y = made(x.requires_grad_())
    assert y.grad_fn.saved_tensors[0] is None  # without a gradient of the weight the input is not kept
    y.sum().backward()
    assert x.grad is not None
    assert made.weight.grad is None
    made.weight.requires_grad_()
    made.bias = None
    made(x.detach()).sum().backward()
    assert made.weight.grad is not None


@needs_kernel
def test_differentiable_once() -> None:
    made, x = layer(), images().requires_grad_()
    (grad,) = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- the layer -------------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("channels_last", [False, True])
def test_layer_equals_the_masked_path(calls: list[torch.Size], channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made, x = layer(groups=2).to(memory_format=layout), images().to(memory_format=layout)
    found = step(made, x)
    assert len(calls) == 1
    assert made(x).is_contiguous(memory_format=layout)
    made.sparse_kernel = False
    assert_close(found, step(made, x))
    assert len(calls) == 2


class Lean(nn.Module):
    """A layer behind the norm and the activation with which it is one function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.BatchNorm2d(16), nn.ReLU(), layer()

    def forward(self, x: Tensor) -> Tensor:
        return norm_act_conv(x, self.norm, self.act, None, self.conv)


@needs_kernel
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [1, 6])
@pytest.mark.parametrize("kind", ["plain", "lean", "linear"])
def test_outputs_can_be_changed_in_place(kind: str, side: int, channels_last: bool) -> None:
    x = images(4, side=side)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    made = {"plain": layer(), "lean": Lean(), "linear": SparseLinear(side, 8, sparsity=0.5)}[kind]
    net = nn.Sequential(made, nn.ReLU(inplace=True))
    expected = step(copy.deepcopy(net).double(), x.double())
    assert use_sparse_kernel(net) == 1
    assert_close(step(net, x), expected)


@needs_kernel
@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_recomputed_gradients_equal_stored_ones(calls: list[torch.Size], mode: str) -> None:
    """To the bit: the kernel gives the same in both evaluations of a branch."""

    class Net(RevSequential):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return torch.cat(super().forward(*x.chunk(2, 1)), 1)

    def branch() -> nn.Module:
        return nn.Sequential(layer(8, 16), nn.BatchNorm2d(16), nn.ReLU(), layer(16, 8))

    net, found = Net([AdditiveCoupling(branch(), branch()) for _ in range(2)], exact=True), []
    for net.mode in ("store", mode):
        found.append(step(net, images()))
    assert len(calls) == 3 * 8  # once stored, twice recomputed
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernel
def test_rigl_trains_as_on_the_masked_path(calls: list[torch.Size]) -> None:
    histories, weights = [], []
    for enabled in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), layer(enabled=enabled), nn.ReLU(), layer(24, 16))
        model[4].sparse_kernel = enabled
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        controller = SparsityController(model, optimizer, "rigl", total_steps=12, interval=3)
        for number in range(12):
            optimizer.zero_grad()
            x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(number))
            (model(x).square().mean() - 1).square().backward()
            optimizer.step()
            controller.step()
        histories.append(controller.history)
        weights.append([p.detach().clone() for p in model.parameters()])
        assert not model[2].weight.detach()[~model[2].mask].any()
    assert len(histories[0]) == 2
    assert histories[0] == histories[1]
    assert_close(*weights)
    assert len(calls) == 2 * 10  # two steps gathered dense gradients


@needs_kernel
@pytest.mark.parametrize("se", [False, True])
def test_lean_norm_act_conv(monkeypatch: pytest.MonkeyPatch, se: bool) -> None:
    """It keeps as little with the kernel as without it, and is differentiable again."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act, self.conv = nn.BatchNorm2d(16), nn.Hardswish(), layer(bias=False)
            self.se = SEModule(16, rd_channels=4) if se else None

        def forward(self, x: Tensor) -> Tensor:
            return norm_act_conv(x, self.norm, self.act, self.se, self.conv)

    net, found, again, kept = Net(), [], [], []
    convolutions: list[int] = []
    saved: list[int] = []
    plain = Structure.convolve
    monkeypatch.setattr(Structure, "convolve", lambda *args: convolutions.append(1) or plain(*args))
    for net.conv.sparse_kernel in (True, False):
        with saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            saved.clear()
            found.append(step(net, images()))
        kept.append(sum(size >= images().numel() for size in saved))
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        again.append(torch.autograd.grad(grad.square().sum(), [x, net.conv.weight]))
    assert len(convolutions) == 2
    assert kept[0] == kept[1]
    assert_close(*found)
    for ours, theirs in zip(*again, strict=True):
        assert float((ours - theirs).norm()) <= 1e-3 * float(theirs.norm())


@needs_kernel
def test_a_converted_revbifpn(calls: list[torch.Size]) -> None:
    """Its gradients are those of stored activations to the bit, and nearly those of the masked path."""
    torch.manual_seed(0)
    model = timm.create_model("revbifpn_s0", num_classes=4, exact=True).train()
    model = convert(model, "sparse:0.9", input_size=(3, 64, 64)).model
    x, found = torch.randn(2, 3, 64, 64), []
    assert use_sparse_kernel(model) > 10
    for mode, enabled in (("reversible", True), ("store", True), ("store", False)):
        use_sparse_kernel(model, enabled)
        revnets.set_mode(model, mode)
        torch.manual_seed(1)  # of stochastic depth
        found.append(step(model, x))
    assert calls
    for ours, stored, masked in zip(*found, strict=True):
        assert torch.equal(ours, stored)
        # batch statistics of four pixels magnify the last bits
        assert float((ours - masked).norm()) <= 0.02 * max(float(masked.norm()), 0.1)


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler() -> None:
    with pytest.raises(KernelUnavailable, match="REVNETS_CXX=none"):
        use_sparse_kernel(layer())
    made = layer()  # such as a pickled one
    with pytest.warns(UserWarning, match="dense kernels"):
        found = step(made, images())
    assert_close(found, step(layer(enabled=False), images()))
