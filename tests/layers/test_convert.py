"""Conversion of whole networks: what is converted, what stays and why, FLOPs before and after."""

import pytest
import timm
import torch
from torch import Tensor, nn

import revnets
from revnets.layers import SparseConv2d, convert, count_costs, fold
from revnets.layers.sparse_ift.parallel import SparseParallelConv2d, SparseParallelLinear
from revnets.reversible import MODES

ISO_FLOP = ["sparse_parallel", "sparse_factorized", "sparse_doped", "sparse_wide"]
NETWORKS = ["resnet18", "revbifpn_s0", "efficientnet_b0", "vit_small_patch16_224"]


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("member", ISO_FLOP)
@pytest.mark.parametrize("name", NETWORKS)
def test_iso_flop(name: str, member: str, sparsity: float) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    dense = count_costs(model, (3, 224, 224))
    report = convert(model, f"{member}:{sparsity}")
    assert report.before.flops == dense.flops
    sparse = count_costs(report.model, (3, 224, 224))  # from the masks of the result
    assert sparse.sparse_flops == pytest.approx(dense.flops, rel=2e-3)
    x = torch.randn(2, 3, 64, 64) if "vit" not in name else torch.randn(1, 3, 224, 224)
    y = report.model.train()(x)
    assert y.shape == (len(x), 10)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in report.model.parameters())
    for layer in report.model.modules():
        if hasattr(layer, "mask"):
            assert not layer.weight.grad[~layer.mask].any()


TINY = [
    "test_resnet",
    "test_efficientnet",
    "test_vit",
    "test_convnext",
    pytest.param("test_revbifpn", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("member", [*ISO_FLOP, "sparse"])
@pytest.mark.parametrize("name", TINY)
def test_tiny_networks(name: str, member: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    was = {n: type(m) for n, m in model.named_modules()}
    report = convert(model, f"{member}:0.75")
    if member == "sparse":
        assert report.after.sparse_flops < 0.6 * report.before.flops
    else:
        assert report.after.sparse_flops == pytest.approx(report.before.flops, rel=2e-3)
    assert (report.model is model) == (member != "sparse_wide")
    layers = {n for n, kind in was.items() if kind in (nn.Conv2d, nn.Linear)}
    assert {c.name for c in report.converted} | {s.name for s in report.skipped} >= layers
    kept = {type(report.model.get_submodule(s.name)) for s in report.skipped}
    assert kept <= {nn.Conv2d, nn.Linear}
    side = 160 if name == "test_vit" else 64
    report.model.train()(torch.randn(2, 3, side, side)).square().mean().backward()
    assert all(p.grad is not None for p in report.model.parameters())


# --- what stays ------------------------------------------------------------------------------------------------------


def reasons(report: object) -> dict[str, str]:
    return {s.name: s.reason for s in report.skipped}  # type: ignore[attr-defined]


def test_what_stays_dense() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_efficientnet")
    found = reasons(convert(model, "sparse_doped:0.75"))
    assert found["conv_stem"] == "the first layer stays dense"
    assert found["classifier"] == "the classifier stays dense"
    assert {r.split(" ")[0] for r in found.values()} == {"the", "depthwise", "squeeze-and-excite"}
    with torch.device("meta"):
        model = timm.create_model("test_efficientnet")
    options = {"type": "sparse_factorized", "sparsity": 0.75, "depthwise": True, "squeeze_excite": True}
    report = convert(model, options)
    assert set(reasons(report)) == {"conv_stem", "classifier"}
    assert report.after.sparse_flops == pytest.approx(report.before.flops, rel=2e-3)


def test_filter_and_shared_weights_and_subclasses() -> None:
    class Own(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), Own(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    net[1].weight = net[0].weight
    report = convert(net, "sparse:0.5", filter=lambda module, name: name != "3", input_size=(6,))
    assert reasons(report) == {
        "0": "it shares its weight with another layer",
        "1": "it shares its weight with another layer",
        "2": "Own is neither nn.Conv2d nor nn.Linear itself",
        "3": "left out by the filter",
        "4": "the classifier stays dense",
    }


def test_a_layer_alone_is_replaced() -> None:
    report = convert(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), "sparse:0.5", input_size=(8, 6, 6))
    assert isinstance(report.model[0], nn.Conv2d)
    assert reasons(report) == {"0": "the first layer stays dense"}


def test_unsuitable_layers_are_named() -> None:
    net = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
    found = reasons(convert(net, "sparse_doped:0.5", input_size=(8,)))
    assert found["0"].startswith("the low-rank path of Linear(8, 2) would have rank 0.5 * 8 * 2 / (8 + 2) < 1")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            (5,),
            "convert: Sequential does not run on an input of shape .1, 5.*, in 0 after op t.*give the right input_size",
        )
    ],
)
def test_wrong_input_size(size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(nn.Sequential(nn.Linear(8, 2)), "sparse:0.5", input_size=size)


def test_report_in_words() -> None:
    report = convert(timm.create_model("test_resnet"), "sparse_doped:0.75")
    text = str(report)
    assert "conv1.0: skipped, the first layer stays dense" in text
    assert "MFLOPs per image" in text
    assert report.table().row_count == len(report.converted) + len(report.skipped)
    assert report.after.table().row_count > 5


@pytest.mark.parametrize("fused", [False, True])
def test_scale_of_attention_follows_its_width(fused: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(24, 64) for _ in range(3))
            self.out, self.temperature = nn.Linear(64, 5), 64**-0.5

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
            if fused:
                y = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.temperature)
            else:
                y = (q[:, 0] @ k[:, 0].mT * self.temperature).softmax(-1)[:, None] @ v
            return self.out(y[:, 0].mean(1))

    model = Attention()
    wide = convert(model, "sparse_wide:0.75", input_size=(7, 24)).model
    assert wide.q.out_features > 64
    assert wide.temperature == wide.q.out_features**-0.5
    assert model.temperature == 64**-0.5


@pytest.mark.parametrize("groups", [2, 3, 5, 7])
def test_widths_stay_multiples_of_the_groups(groups: int) -> None:
    """Of grouped convolutions both ends are cut into as many parts."""
    width = 4 * groups
    model = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, groups=groups), nn.ReLU(),
        nn.Conv2d(2 * width, width, 1), nn.Flatten(), nn.Linear(16 * width, 3),
    )  # fmt: skip
    for sparsity in (0.3, 0.5, 0.75, 0.9):
        report = convert(model, f"sparse_wide:{sparsity}", input_size=(3, 8, 8))
        middle = report.model[2]
        assert middle.groups == groups
        assert middle.out_channels % groups == middle.in_channels % groups == 0
        assert middle.out_channels > 2 * width, str(report)
        assert report.model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


class Parts(nn.Module):
    """Takes a layer's output apart, by sizes that it keeps as integers of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.width, self.heads = how, 32, 4
        self.mix, self.out = nn.Linear(24, 64), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        if self.how == "split":
            a, b = y.split(self.width, -1)
        elif self.how == "split with sizes":
            a, b = y.split([self.width, self.width], -1)
        elif self.how == "chunk":
            a, b = y.chunk(2, -1)
        else:
            a, b = y.view(*y.shape[:-1], 2, self.width).unbind(-2)
        return self.out(torch.tanh(a) * b)


@pytest.mark.parametrize("how", ["split", "split with sizes", "chunk", "view"])
def test_sizes_that_a_module_keeps_follow_its_widths(how: str) -> None:
    model = nn.Sequential(Parts(how), nn.ReLU(), nn.Linear(5, 3))
    report = convert(model, "sparse_wide:0.75", input_size=(7, 24))
    wide = report.model[0]
    assert wide.mix.out_features > 64, str(report)
    assert wide.width * 2 == wide.mix.out_features
    assert wide.out.in_features == wide.width
    assert report.model(torch.randn(2, 7, 24)).shape == (2, 7, 3)
    assert model[0].width == 32


@pytest.mark.parametrize("member", [*ISO_FLOP, "sparse"])
def test_frozen_layers_and_channels_last_stay_so(member: str) -> None:
    model = timm.create_model("test_resnet").to(memory_format=torch.channels_last)
    model.layer2.requires_grad_(False)
    wide = convert(model, f"{member}:0.75").model
    assert not any(p.requires_grad for n, p in wide.layer2.named_parameters() if ".norm" not in n)
    assert all(p.requires_grad for p in wide.layer3.parameters())
    four = [p for p in wide.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in four)
    assert any(not p.is_contiguous() for p in four)


def test_composed_report_says_things_once() -> None:
    report = convert(timm.create_model("test_resnet"), "sparse:0.5+dense")
    lines = [line for line in str(report).splitlines() if line.endswith("stays dense")]
    assert len(lines) == len(set(lines)) == 2


def test_masks_keep_a_weight() -> None:
    assert int(SparseConv2d(1, 2, 1, sparsity=0.95).mask.sum()) == 1


# --- norms and activations that follow -----------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions with norms, a sum before the second activation, which may be the first one again."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True)
        self.act2 = self.act1 if shared else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + x)


@pytest.mark.parametrize("norm_only", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_branches_take_over_what_follows(shared: bool, norm_only: bool) -> None:
    options = {"type": "sparse_parallel", "sparsity": 0.5, "norm_only": norm_only}
    net = convert(Block(shared), options, input_size=(3, 8, 8)).model
    takes_act = not shared and not norm_only
    assert isinstance(net.conv1, SparseParallelConv2d)
    assert [type(b.act) for b in net.conv1.branches] == [nn.ReLU if takes_act else type(None)] * 2
    assert [type(b.norm) for b in net.conv1.branches] == [nn.BatchNorm2d] * 2
    assert type(net.bn1) is nn.Identity
    assert type(net.act1) is (nn.Identity if takes_act else nn.ReLU)
    assert [type(b.act) for b in net.conv2.branches] == [type(None)] * 2  # the sum comes first
    assert type(net.act2) is nn.ReLU


def test_norms_with_activation_inside_and_linear_layers() -> None:
    net = convert(timm.create_model("test_efficientnet"), "sparse_parallel:0.5").model
    made = next(m for m in net.modules() if isinstance(m, SparseParallelConv2d))
    assert made.branches[0].norm is not made.branches[1].norm
    report = convert(timm.create_model("test_vit"), "sparse_parallel:0.5")
    block = report.model.blocks[0]
    assert isinstance(block.mlp.fc1, SparseParallelLinear)
    assert isinstance(block.mlp.fc1.branches[0].act, nn.GELU)
    assert isinstance(block.mlp.act, nn.Identity)
    notes = {c.name: c.note for c in report.converted}
    assert notes["blocks.0.attn.qkv"] == "neither norm nor activation follows: the sum of its branches is linear"


# --- timm's create_model ---------------------------------------------------------------------------------------------


def test_create_model_with_layers() -> None:
    model = timm.create_model("test_revbifpn", layers="sparse_doped:0.5", in_chans=1, num_classes=3)
    assert any(isinstance(m, SparseConv2d) for m in model.modules())
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    features = timm.create_model("test_revbifpn", layers={"type": "sparse", "sparsity": 0.5}, features_only=True)
    assert any(isinstance(m, SparseConv2d) for m in features.modules())
    assert len(features(torch.zeros(1, 3, 32, 32))) == 4
    with pytest.raises(ValueError, match=r"layers='sparse:0\.5' with pretrained=True"):
        timm.create_model("test_revbifpn", pretrained=True, layers="sparse:0.5")
    with pytest.raises(ValueError, match="expected one of dense"):
        timm.create_model("test_revbifpn", layers="sprs:0.5")


def test_widened_revbifpn_stays_as_it_was_set() -> None:
    plain = timm.create_model("test_revbifpn", num_classes=7, mode="checkpoint").eval()
    plain.reset_classifier(4)
    report = revnets.convert(plain, "sparse_wide:0.5")
    assert report.model.mode == "checkpoint"
    assert not report.model.training
    assert [n for n, _ in report.model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert report.model.pretrained_cfg is plain.pretrained_cfg
    assert report.model.num_features > plain.num_features


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "store"])
def test_widened_revbifpn_is_as_it_was_set_afterwards(mode: str) -> None:
    """What has changed since it was made counts, not what it was made with."""
    plain = timm.create_model("test_revbifpn", num_classes=7, mode="store" if mode == "reversible" else "reversible")
    revnets.set_mode(plain, mode)
    plain.reset_classifier(4, "max")
    wide = revnets.convert(plain.double(), "sparse_wide:0.5").model
    assert {m.mode for m in wide.modules() if vars(m).get("mode") in MODES} == {mode}
    assert wide.num_classes == wide.classifier.out_features == 4
    assert wide.global_pool.pool_type == "max"
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


# --- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [*ISO_FLOP, "sparse"])
def test_folded_networks_compute_the_same(member: str) -> None:
    torch.manual_seed(0)
    net = convert(timm.create_model("test_resnet", num_classes=5), f"{member}:0.75").model
    x = torch.randn(4, 3, 64, 64)
    net.train()(x)
    net.eval()
    plain = fold(net)
    assert torch.allclose(plain(x), net(x), atol=1e-4, rtol=1e-3)
    assert not [n for n, _ in plain.named_buffers() if n.endswith("mask")]
    if member != "sparse_parallel":
        assert not [m for m in plain.modules() if type(m).__module__.startswith("revnets")]
