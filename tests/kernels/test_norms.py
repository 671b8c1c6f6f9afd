"""Batch norms on the training kernel: against float64, and the networks whose norms it computes."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revnets.kernels import norms
from revnets.kernels.norms import NAMES, grads, measured, measured_means, normed, plane_sums
from revnets.layers import MBConv, SparseConv2d, kernel_norms, make_lean, use_sparse_kernel
from revnets.layers.lean.network import keeper_of
from revnets.reversible import AdditiveCoupling, RevSequential

from .nets import assert_close, images, needs_kernel, step

VALUES = {
    "": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
pytestmark = needs_kernel


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the kernel was asked for, see ``norms``."""
    seen: list[int] = []
    plain = norms._run

    def run(work: int, *rest: Any, **more: Any) -> None:
        seen.append(work)
        plain(work, *rest, **more)

    monkeypatch.setattr(norms, "_run", run)
    return seen


@pytest.fixture(autouse=True)
def _small_maps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_norms, "MIN_NUMBERS", 0)


# --- the functions ---------------------------------------------------------------------------------------------------


def _away_from_kinks(z: Tensor) -> bool:
    return min(float((z.detach() - kink).abs().min()) for kink in (-3.0, 0.0, 3.0, 6.0)) > 1e-5


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20)),
    act=st.sampled_from(list(NAMES)),
    gated=st.booleans(),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    seed=st.integers(0, 99),
)
def test_values_and_gradients(size: Any, act: str, gated: bool, layouts: Any, seed: int) -> None:
    """Rests of vectors and of rows, planes of a pixel, gradients in the other layout, factors of a gate."""
    torch.manual_seed(seed)
    n, c, *_ = size
    x = (2 * torch.randn(size) + 1).contiguous(memory_format=layouts[0])
    weight, bias, dy = torch.randn(c), torch.randn(c), torch.randn(size).contiguous(memory_format=layouts[1])
    gates, of_means = (torch.rand(n, c), torch.randn(n, c)) if gated else (None, None)
    theirs = [t.double().requires_grad_() for t in (x, weight, bias)]
    z = F.batch_norm(theirs[0], None, None, theirs[1], theirs[2], True, 0.0, 0.1) if n * size[2] * size[3] > 1 else None
    if z is None or not _away_from_kinks(z):
        return
    value = VALUES[act](z)
    norm, y = measured(x, weight, bias, 0.1, act)
    assert y.stride() == x.stride()
    again, means = measured_means(x, weight, bias, 0.1, act)
    assert torch.equal(norm.mean, again.mean)
    assert torch.equal(norm.var, again.var)
    expected = [value, value.mean((2, 3)), (value * dy).sum((2, 3))]
    assert_close([y, means, plane_sums(norm, dy)], expected)
    factors = torch.ones(n, c) if gates is None else gates
    loss = (value * dy * factors[:, :, None, None]).sum()
    if of_means is not None:
        loss = loss + (value.sum((2, 3)) * of_means).sum()
        assert_close([normed(norm, gates)], [value * factors[:, :, None, None]])
    kept = dy.clone()
    dx, *others = grads(dy, norm, True, gates, of_means)
    assert torch.equal(dy, kept)
    assert dx is not None
    assert dx.stride() == x.stride()
    assert_close([dx, *others], list(torch.autograd.grad(loss, theirs)))
    assert torch.equal(dx, grads(dy, norm, True, gates, of_means, owned=True)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_sums_of_many_pixels_are_precise(layout: torch.memory_format, mean: float) -> None:
    """Also where the deviation is small against the mean."""
    torch.manual_seed(0)
    x = (torch.randn(4, 20, 120, 120) + mean).contiguous(memory_format=layout)
    norm, _ = measured(x, torch.ones(20), torch.zeros(20), 0.0, "")
    expected = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(norm.var.double(), expected[0], rtol=3e-6, atol=0)
    torch.testing.assert_close(norm.mean.double(), expected[1], rtol=1e-6, atol=1e-7)
    dy = torch.rand(x.shape).contiguous(memory_format=layout)
    _, _, of_bias = grads(dy, norm, False)
    torch.testing.assert_close(of_bias.double(), dy.double().sum((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [7, 100])
def test_threads_do_not_change_a_bit(layout: torch.memory_format, channels: int) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(3, channels, 9, 9).contiguous(memory_format=layout) for _ in range(2))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            norm, y = measured(x, torch.ones(channels), torch.zeros(channels), 1e-5, "silu")
            found.append([norm.mean, norm.var, y, plane_sums(norm, dy), *grads(dy, norm)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))  # type: ignore[arg-type]


def test_what_is_not_a_number_stays_so() -> None:
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 0, 0] = float("nan")
    for act in NAMES:
        _, y = measured(x, torch.ones(3), torch.zeros(3), 1e-5, act)
        assert y[:, 1].isnan().all()
        assert y[:, ::2].isfinite().all()


def test_what_does_not_belong_together_is_refused() -> None:
    x = images()
    norm, _ = measured(x, torch.ones(16), torch.zeros(16), 1e-5, "")
    with pytest.raises(ValueError, match="gradient of shape"):
        grads(x[:, :8], norm)
    with pytest.raises(ValueError, match="weight of 8 numbers"):
        measured(x, torch.ones(8), torch.zeros(16), 1e-5, "")
    with pytest.raises(ValueError, match="gates of 16 numbers"):
        normed(norm, torch.ones(1, 16))


# --- networks --------------------------------------------------------------------------------------------------------


def _net(act: type[nn.Module] | None = nn.ReLU6) -> nn.Sequential:
    torch.manual_seed(0)
    norm: nn.Module = nn.BatchNorm2d(24) if act is None else BatchNormAct2d(24, act_layer=act)
    return nn.Sequential(SparseConv2d(16, 24, 1, sparsity=0.5), norm, nn.Conv2d(24, 8, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", [None, nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
def test_networks(works: list[int], act: Any, layout: torch.memory_format) -> None:
    """Values, gradients, statistics; in evaluation torch's own."""
    net, x = _net(act).to(memory_format=layout), images().contiguous(memory_format=layout)
    expected = step(theirs := copy.deepcopy(net).double(), x.double())
    assert use_sparse_kernel(net) == 1
    assert_close(step(net, x), expected)
    assert works == [norms.STATISTICS | norms.NORMED, norms.AFFINE_SUMS | norms.GRADIENT]
    torch.testing.assert_close(dict(net.named_buffers()), dict(theirs.named_buffers()), check_dtype=False)
    assert net[1].num_batches_tracked == 1
    assert_close([net.eval()(x)], [theirs.eval()(x.double())])
    assert len(works) == 2


def test_copies_pickles_and_the_way_back(works: list[int]) -> None:
    net = _net()
    use_sparse_kernel(net)
    keys = list(net.state_dict())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other(images())
        assert other[1].num_batches_tracked == 1
    assert net[1].num_batches_tracked == 0  # theirs moved
    assert len(works) == 2
    assert use_sparse_kernel(net, enabled=False) == 0
    assert vars(net[1]).get("forward") is None
    net(images())
    assert list(net.state_dict()) == keys
    assert len(works) == 2


def test_networks_without_layers_for_the_kernel_keep_their_norms(works: list[int]) -> None:
    net = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
    assert use_sparse_kernel(net) == 0
    net(images())
    assert not works


def _small(norm: nn.Module, x: Tensor) -> Iterator[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_norms, "MIN_NUMBERS", x.numel() + 1)
        yield norm(x)


def _changed(**settings: Any) -> Any:
    def run(norm: nn.Module, x: Tensor) -> Iterator[Tensor]:
        for name, value in settings.items():
            setattr(norm, name, value)
        yield norm(x)

    return run


def _autocast(norm: nn.Module, x: Tensor) -> Iterator[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield norm(x)


OTHER_WAYS: dict[str, Any] = {
    "small": _small,
    "autocast": _autocast,
    "double": lambda norm, x: iter([norm.double()(x.double())]),
    "gaps": lambda norm, x: iter([norm(torch.cat([x, x], 1)[:, :16])]),
    "compiled": lambda norm, x: iter([torch.compile(norm, backend="eager")(x)]),
    "momentum": _changed(momentum=None),
    "statistics": _changed(track_running_stats=False, running_mean=None, running_var=None),
    "weights": _changed(affine=False, weight=None, bias=None),
    "drop": _changed(drop=nn.Dropout(0.5)),
    "act": _changed(act=nn.GELU()),
    "traced": lambda norm, x: iter([torch.fx.symbolic_trace(nn.Sequential(norm))(x)]),
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_torchs_norms_where_the_kernel_does_not_apply(works: list[int], way: str) -> None:
    norm = BatchNormAct2d(16)
    kernel_norms.use_kernel_norms(norm)
    (y,) = OTHER_WAYS[way](norm, images())
    assert y.shape == images().shape
    assert not works


def test_hooks_and_frozen_weights() -> None:
    net, seen = _net(), []
    use_sparse_kernel(net)
    net[1].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    net[1].bias.requires_grad_(False)
    net[0].requires_grad_(False)
    net(images()).sum().backward()
    assert seen == [torch.Size((2, 24, 6, 6))]
    assert net[1].bias.grad is None
    assert net[1].weight.grad is not None


def test_differentiable_twice() -> None:
    found = []
    for enabled in (True, False):
        norm, x = BatchNormAct2d(16, act_layer=nn.ReLU6), images().requires_grad_()
        kernel_norms.use_kernel_norms(norm, enabled)
        (grad,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, norm.weight]))
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm()) <= 1e-3 * float(theirs.norm())


@pytest.mark.parametrize("watched", [False, True])
def test_branches_that_are_computed_again(works: list[int], watched: bool) -> None:
    """The same bits, and the statistics move once; where somebody looks on forwards, torch's own norms do."""

    class Net(RevSequential):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return torch.cat(super().forward(*x.chunk(2, 1)), 1)

    def branch() -> nn.Module:
        return nn.Sequential(SparseConv2d(8, 8, 1, sparsity=0.5, bias=False), BatchNormAct2d(8))

    torch.manual_seed(0)
    net, found = Net([AdditiveCoupling(branch(), branch())], exact=True), []
    use_sparse_kernel(net)
    for net.mode in ("store", "reversible"):
        x = images().requires_grad_()
        with FlopCounterMode(display=False) if watched else nullcontext():
            y = net(x)
        grads_of = torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
        found.append([y.detach(), *grads_of])
    assert [count.item() for name, count in net.named_buffers() if name.endswith("tracked")] == [2, 2]
    if watched:  # other bits the second time
        for ours, stored in zip(*found, strict=True):
            assert float((ours - stored).norm()) <= 1e-3 * float(stored.norm())
    else:
        assert all(map(torch.equal, *found))
        assert len(works) == 2 * (2 + 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("se_ratio", [0.0, 0.5])
def test_lean_layers(works: list[int], se_ratio: float, layout: torch.memory_format) -> None:
    """They keep as little, and give what they give on torch's own kernels."""
    torch.manual_seed(0)
    block = MBConv(16, 24, exp_ratio=2, se_ratio=se_ratio).to(memory_format=layout)
    other, x = copy.deepcopy(block), images().contiguous(memory_format=layout)
    kernel_norms.use_kernel_norms(block)
    found, expected = step(block, x), step(other, x)
    assert len(works) >= 6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.stride() == theirs.stride()
        assert float((ours - theirs).abs().max()) <= 1e-4 * max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(dict(block.named_buffers()), dict(other.named_buffers()))


@needs_kernel
def test_a_pass_in_evaluation_may_come_before_one_in_training(works: list[int]) -> None:
    """Running statistics move without a new version, as torch's do: the first pass has kept them."""
    net, x = _net(), images(4)
    use_sparse_kernel(net)
    (net.eval()(x).square().mean() + net.train()(x).mean()).backward()
    assert works


@needs_kernel
def test_norms_that_change_later(works: list[int]) -> None:
    norm, x = nn.BatchNorm2d(8), images(4, 8)
    kernel_norms.use_kernel_norms(norm)
    replica = norm._replicate_for_data_parallel()
    replica.weight, replica.bias = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
    assert not replica(x).any()
    norm.running_mean = norm.running_var = None
    assert norm(x).shape == x.shape
    norm = nn.BatchNorm2d(8)
    kernel_norms.use_kernel_norms(norm)
    nn.utils.parametrizations.weight_norm(norm, "weight", dim=None)
    assert norm(x).shape == x.shape
    assert not works


@needs_kernel
def test_lean_networks_keep_as_little_with_the_kernel() -> None:
    torch.manual_seed(0)
    layers = [SparseConv2d(16, 16, 1, sparsity=0.5, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    net = make_lean(nn.Sequential(*copy.deepcopy(layers), *copy.deepcopy(layers))).train()
    kept = []
    for enabled in (False, True):
        use_sparse_kernel(net, enabled)
        with keeper_of(net).active() as keeper:
            type(net)._plain_class.forward(net, images(4, 16))
        kept.append(keeper.kept)
    assert kept[0] == kept[1]
