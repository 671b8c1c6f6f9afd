"""The iso-FLOP members: FLOPs counted from the masks equal the dense layer's, and formulas are those of the paper."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from revnets import layers
from revnets.layers import count_costs, fold
from revnets.layers.sparse_ift.doped import low_rank
from revnets.layers.sparse_ift.factorized import inner_width
from revnets.layers.sparse_ift.parallel import num_branches

NAMES = ["Parallel", "Factorized", "Doped"]
SPARSITIES = [0.5, 0.75, 0.9]
SHAPES = {
    "linear": ((48, 80), {}),
    "pointwise": ((48, 80, 1), {"bias": False}),
    "conv": ((24, 40, 3), {"stride": 2, "padding": 1}),
    "oblong": ((24, 40, (3, 2)), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
    "grouped": ((24, 48, 3), {"padding": 2, "dilation": 2, "groups": 2, "padding_mode": "reflect"}),
}


def member(name: str, shape: str, sparsity: float) -> tuple[nn.Module, nn.Module]:
    """The member and the dense layer with the same arguments."""
    torch.manual_seed(0)
    args, kwargs = SHAPES[shape]
    kind = "Linear" if shape == "linear" else "Conv2d"
    made = getattr(layers, f"Sparse{name}{kind}")(*args, sparsity=sparsity, **kwargs)
    return made, getattr(nn, kind)(*args, **kwargs)


def size(shape: str) -> tuple[int, ...]:
    return (48,) if shape == "linear" else (SHAPES[shape][0][0], 9, 8)


def image(shape: str) -> Tensor:
    return torch.randn(3, *size(shape), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_flops_shape_and_gradients(name: str, shape: str, sparsity: float) -> None:
    made, dense = member(name, shape, sparsity)
    cost, budget = count_costs(made, size(shape)), count_costs(dense, size(shape))
    assert cost.sparse_flops == budget.flops
    assert cost.flops > budget.flops
    y = made(image(shape))
    assert y.shape == dense(image(shape)).shape
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    for attribute in ("in_channels", "out_channels", "stride", "in_features", "out_features"):
        assert getattr(made, attribute, None) == getattr(dense, attribute, None)
    assert f"sparsity={sparsity:g}" in made.extra_repr()


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    ins=st.integers(1, 12),
    outs=st.integers(1, 12),
    kernel=st.integers(1, 3),
    sparsity=st.floats(0, 0.95),
    name=st.sampled_from(NAMES),
)
def test_exact_at_any_size(groups: int, ins: int, outs: int, kernel: int, sparsity: float, name: str) -> None:
    args = (groups * ins, groups * outs, kernel)
    dense = nn.Conv2d(*args, groups=groups)
    make = getattr(layers, f"Sparse{name}Conv2d")
    few = dense.weight.numel() < 8
    too_small = {"Parallel": False, "Factorized": few, "Doped": few or low_rank(dense, sparsity) < 1}
    try:
        made = make(*args, groups=groups, sparsity=sparsity)
    except layers.Unsuitable:
        assert too_small[name]
        return
    assert name != "Doped" or low_rank(dense, sparsity) >= 1
    assert count_costs(made, (args[0], 4, 4)).sparse_flops == count_costs(dense, (args[0], 4, 4)).flops


def test_formulas() -> None:
    assert [num_branches(s) for s in SPARSITIES] == [2, 4, 10]
    conv, linear = nn.Conv2d(32, 64, 3), nn.Linear(32, 96)
    assert inner_width(conv, 0.75) == 210  # ceil(9 * 32 * 64 / (0.25 * (9 * 32 + 64)))
    assert low_rank(conv, 0.75) == 39  # floor(0.75 * 9 * 32 * 64 / (9 * 32 + 64))
    assert inner_width(linear, 0.5) == 48  # 32 * 96 / (0.5 * (32 + 96))
    assert low_rank(linear, 0.5) == 12  # 0.5 * 32 * 96 / (32 + 96)


def test_parallel_is_the_sum_of_its_branches_with_exact_masks() -> None:
    made, dense = member("Parallel", "conv", 0.75)
    counts = [int(b.layer.mask.sum()) for b in made.branches]
    assert counts == [dense.weight.numel() // 4] * 4
    x = image("conv")
    twin = copy.deepcopy(made)
    by_hand = sum(b.act(b.norm(nn.functional.conv2d(x, b.layer.weight, b.layer.bias, 2, 1))) for b in twin.branches)
    assert torch.allclose(made(x), by_hand, atol=1e-5)


def test_doped_without_rank_names_the_constraint() -> None:
    with pytest.raises(ValueError, match=r"of Linear\(1, 2\) would have rank 0.5 \* 1 \* 2 / \(1 \+ 2\) < 1"):
        layers.SparseDopedLinear(1, 2, sparsity=0.5)


# --- folding ---------------------------------------------------------------------------------------------------------


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """In eval mode with running statistics and affine parameters that are not those of the start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model.train()(x)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_folded_computes_the_same(name: str, shape: str) -> None:
    made, _ = member(name, shape, 0.75)
    x = image(shape)
    settled(made, x)
    plain = fold(made)
    assert torch.allclose(plain(x), made(x), atol=1e-4)
    assert not [n for n, _ in plain.named_buffers() if n.endswith("mask")]
    if name == "Doped":
        assert type(plain) in (nn.Linear, nn.Conv2d)
    if name == "Factorized":
        assert type(plain) is nn.Sequential


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_linear_branches_merge_into_one_layer(norm: type[nn.Module] | None) -> None:
    torch.manual_seed(0)
    made = layers.SparseParallelConv2d(8, 12, 3, padding=1, sparsity=0.75, norm_layer=norm, act_layer=None)
    x = torch.randn(4, 8, 6, 6)
    settled(made, x)
    plain = fold(made)
    assert type(plain) is nn.Conv2d
    assert torch.allclose(plain(x), made(x), atol=1e-4)
