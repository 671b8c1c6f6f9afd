"""Masked layers: exact counts, masked gradients in any loop, the dense gradient once per step, state that survives."""

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import revnets
from revnets.layers import MBConv, SparseConv2d, SparseLinear, convert
from revnets.reversible import AdditiveCoupling, RevSequential
from tests.helpers import assert_same_step, guards_work, training_step

MEMBERS = ["sparse", "sparse_parallel", "sparse_factorized", "sparse_doped", "sparse_wide"]


def make(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return SparseLinear(12, 20, sparsity=0.75, **options)
    groups = 4 if kind == "grouped" else 1
    return SparseConv2d(8, 12, 3, padding=1, groups=groups, sparsity=0.75, **options)


def data(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((5, 12) if kind == "linear" else (2, 8, 6, 6), generator=generator)


KINDS = ["linear", "conv", "grouped"]


def masked(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (SparseConv2d, SparseLinear))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion"])
def test_a_plain_loop_stays_sparse(kind: str, optimizer: str) -> None:
    layer = make(kind)
    kept = int(layer.mask.sum())
    assert kept == round(0.25 * layer.mask.numel())
    step = create_optimizer_v2(layer, opt=optimizer, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        step.zero_grad()
        layer(data(kind)).square().mean().backward()
        assert not layer.weight.grad[~layer.mask].any()
        step.step()
        assert not layer.weight.detach()[~layer.mask].any()
    assert int((layer.weight != 0).sum()) == kept


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_dense_layer_with_that_weight(kind: str) -> None:
    layer = make(kind)
    dense = nn.Linear(12, 20) if kind == "linear" else nn.Conv2d(8, 12, 3, padding=1, groups=layer.groups)
    dense.load_state_dict({"weight": layer.weight * layer.mask, "bias": layer.bias})
    assert torch.equal(layer(data(kind)), dense(data(kind)))
    layer.gather_dense_grad = True
    for model in (layer, dense):
        model(data(kind)).square().mean().backward()
    assert torch.equal(layer.dense_grad, dense.weight.grad)
    assert torch.equal(layer.weight.grad, dense.weight.grad * layer.mask)
    layer(data(kind)).square().mean().backward()  # accumulation
    assert torch.allclose(layer.dense_grad, 2 * dense.weight.grad, rtol=1e-5, atol=1e-7)


def test_weights_set_from_outside_have_no_effect_where_masked() -> None:
    layer = make("conv")
    before = layer(data("conv"))
    with torch.no_grad():
        layer.weight.add_(~layer.mask)
    assert torch.equal(layer(data("conv")), before)


def test_set_mask_drops_to_zero_and_grows_from_zero() -> None:
    layer = make("conv")
    old, weight = layer.mask.clone(), layer.weight.detach().clone()
    layer.set_mask(~old)
    assert not layer.weight.any()
    assert torch.equal(layer.mask, ~old)
    layer = make("conv")
    layer.set_mask(old)
    assert torch.equal(layer.weight, weight)
    with pytest.raises(ValueError, match=r"mask of shape \(3,\).*\(12, 8, 3, 3\)"):
        layer.set_mask(torch.ones(3, dtype=torch.bool))


def test_copies_and_checkpoints_keep_the_mask_and_not_the_gathered_gradient() -> None:
    layer = make("conv")
    layer.gather_dense_grad = True
    layer(data("conv")).sum().backward()
    assert "dense_grad" not in layer.state_dict()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = SparseConv2d(8, 12, 3, padding=1, sparsity=0.75)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert other.dense_grad is None
        assert torch.equal(other.mask, layer.mask)
        assert torch.equal(other.weight, layer.weight)
    dense = nn.Conv2d(8, 12, 3)
    layer.load_state_dict(dense.state_dict(), strict=False)
    assert torch.equal(layer.weight, dense.weight * layer.mask)


def test_initial_scale() -> None:
    torch.manual_seed(0)
    plain = SparseConv2d(64, 128, 3, groups=2, sparsity=0.9)
    wide = SparseConv2d(64, 128, 3, groups=2, sparsity=0.9, init_scale=True)
    expected = (2 / (64 * 9)) ** 0.5
    plain, wide = (layer.weight.detach()[layer.mask].std().item() for layer in (plain, wide))
    assert plain == pytest.approx(expected, rel=0.05)
    assert wide == pytest.approx(expected / 0.1**0.5, rel=0.05)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, "0.5", True])
def test_sparsity_outside_its_range(sparsity: object) -> None:
    with pytest.raises(ValueError, match=rf"sparsity={sparsity!r}: expected a number from 0 up to, not including, 1"):
        SparseLinear(4, 4, sparsity=sparsity)


def test_repr_says_what_is_active() -> None:
    assert "sparsity=0.75, weights=216/864" in repr(make("conv"))


@guards_work
def test_compile() -> None:
    layer, x = make("conv"), data("conv")
    compiled = torch.compile(layer, backend="aot_eager")
    for gather in (False, True, False):
        layer.gather_dense_grad, layer.dense_grad = gather, None
        layer.zero_grad()
        compiled(x).square().mean().backward()
        assert (layer.dense_grad is not None) == gather
        assert not layer.weight.grad[~layer.mask].any()


class Couplings(nn.Module):
    """A reversible network of three couplings of MBConv branches, with the ends of a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2)
        self.body = RevSequential([AdditiveCoupling(self.block(), self.block()) for _ in range(3)], exact=True)
        self.head = nn.Linear(32, 5)

    def block(self) -> MBConv:
        return MBConv(16, 16, exp_ratio=2, se_ratio=0.25, drop_path_rate=0.2)

    def forward(self, x: Tensor) -> Tensor:
        (y,) = self.body(self.stem(x).float())
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("member", MEMBERS)
def test_reversible_modes_agree_to_the_bit(member: str, autocast: bool) -> None:
    torch.manual_seed(0)
    report = convert(Couplings(), f"{member}:0.75", input_size=(3, 16, 16))
    assert len(report.converted) == 12
    assert report.after.sparse_flops == pytest.approx(
        report.before.flops * (1 if member != "sparse" else 0.45), rel=0.1
    )
    check_modes(report.model, 12, autocast)


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_revbifpn_modes_agree_to_the_bit(member: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_revbifpn", layers=f"{member}:0.75", num_classes=5, drop_path_rate=0.2)
    check_modes(model, 51, autocast=False)


def check_modes(model: nn.Module, at_least: int, autocast: bool) -> None:
    """A step in every mode: the same gradients, and the dense ones gathered once."""
    for layer in masked(model.train()).values():
        layer.gather_dense_grad = True
    x, results = torch.randn(2, 3, 32, 32), {}
    for mode in ("store", "checkpoint", "reversible"):
        twin = copy.deepcopy(model)
        step = training_step(twin, (x,), lambda y: y.float().square().mean(), mode, autocast=autocast)
        results[mode] = step, {name: layer.dense_grad for name, layer in masked(twin).items()}
        for name, layer in masked(twin).items():
            gathered = layer.dense_grad.to(layer.weight.dtype) * layer.mask
            assert torch.equal(gathered, layer.weight.grad), f"{name}: gathered more or less than once"
    assert len(results["store"][1]) >= at_least
    for mode in ("checkpoint", "reversible"):
        assert_same_step(results[mode][0], results["store"][0], 0)
        for name, grad in results[mode][1].items():
            assert torch.equal(grad, results["store"][1][name])


def test_lean_convolutions_keep_no_more_than_plain_ones() -> None:
    torch.manual_seed(0)
    net = Couplings().train()
    revnets.set_mode(net, "store")
    sizes = []
    for model in (net, convert(copy.deepcopy(net), "sparse:0.5", input_size=(3, 32, 32)).model):
        kept: dict[int, int] = {}
        weights = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}

        def note(t: Tensor, kept: dict[int, int] = kept, weights: set[int] = weights) -> Tensor:
            if t.data_ptr() not in weights and t.dim() == 4 and t.shape[0] == 7:
                kept[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = model(torch.randn(7, 3, 32, 32)).sum()
        sizes.append(sum(kept.values()) + 0 * len(loss.shape))
    assert sizes[0] == sizes[1] > 0
