"""FLOPs against closed forms; followed widths against rebuilt networks."""

import pytest
import timm
import torch
from torch import Tensor, nn

from revnets.layers import SparseConv2d, SparseLinear, convert, count_costs
from revnets.layers.sparse_ift.widen import Coupling, WidenError, widen
from revnets.layers.trace import TraceError, trace


def test_closed_forms() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),  # 8 x 8 x 8
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        SparseConv2d(8, 12, 3, groups=2, sparsity=0.75),  # 12 x 6 x 6
        nn.BatchNorm2d(12),
        nn.Flatten(),
        SparseLinear(432, 10, sparsity=0.9),
    )
    layers = {layer.name: layer for layer in count_costs(net, (3, 16, 16)).layers}
    assert layers["0"].flops == layers["0"].sparse_flops == 2 * 27 * 8 * 64
    assert layers["1"].flops == 2 * 25 * 8 * 64
    assert layers["2"].flops == 2 * 9 * 4 * 12 * 36
    assert layers["2"].sparse_flops == 2 * int(net[2].mask.sum()) * 36 == layers["2"].flops // 4
    assert layers["5"].sparse_flops == 2 * int(net[5].mask.sum()) == 2 * 432
    assert layers["5"].parameters == 4330
    assert layers["5"].active_parameters == 432 + 10
    assert layers["3"].parameters == 24
    assert layers["3"].flops == 0


def test_attention_counts() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
    n, d = 197, 192
    patches, classifier = 196 * 3 * 16 * 16 * d, d * 1000
    block = n * d * (3 * d + d + 8 * d) + 2 * n * n * d
    assert count_costs(model, (3, 224, 224)).flops == 2 * (patches + block + classifier)


def test_published_macs() -> None:
    with torch.device("meta"):
        resnet = timm.create_model("resnet18")
    assert count_costs(resnet, (3, 224, 224)).flops == 2 * 1_814_073_344
    assert count_costs(resnet, (3, 224, 224)).parameters == 11_689_512


def test_meta_masks_count_by_sparsity() -> None:
    with torch.device("meta"):
        layer = SparseLinear(40, 10, sparsity=0.75)
    assert count_costs(layer, (40,)).sparse_flops == 200


def test_trace_leaves_the_model_as_it_is() -> None:
    model = timm.create_model("test_resnet").train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    trace(model, (3, 64, 64))
    assert model.training
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(TraceError, match="ResNet does not run on an input of shape"):
        trace(model, (5, 64, 64))


# --- widths ----------------------------------------------------------------------------------------------------------

FAMILIES = ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_byobnet"]
LARGE = ["resnet50", "resnext50_32x4d", "seresnet50", "efficientnet_b0", "mobilenetv2_100", "mobilenetv3_large_100"]
LARGE += [
    "mobilenetv4_conv_small",
    "convnext_tiny",
    "convnextv2_nano",
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
]
LARGE += ["densenet121", "swin_tiny_patch4_window7_224", "regnety_002", "hrnet_w18"]
LARGE += ["res2net50_14w_8s", "skresnet18", "resnest14d", "mobilenetv4_hybrid_medium"]


@pytest.mark.parametrize("factor", [2.0, 1.41])
@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_families_widen(name: str, factor: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    size = (3, *timm.get_pretrained_cfg(name).input_size[1:])
    recorded = trace(model, size)
    wide, again = widen(model, Coupling(model, recorded), factor, size)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    inner = [n for n, m in layers.items() if m.weight.shape[0] > 8 and n not in (_ends(model))]
    grown = [n for n in inner if wide.get_submodule(n).weight.shape[0] > layers[n].weight.shape[0]]
    stay = 0.25 if "hybrid" in name else 0.1  # attention whose heads share their keys keeps its width
    assert len(grown) >= (1 - stay) * len(inner)
    assert again.outputs[0].shape == recorded.outputs[0].shape
    ratio = again.flops / recorded.flops
    assert factor**2 * 0.6 < ratio < factor**2 * 1.2
    first = wide.get_submodule(_first(model))
    assert first.weight.shape[1] == 3


def _first(model: nn.Module) -> str:
    cfg = model.pretrained_cfg["first_conv"]
    return cfg if isinstance(cfg, str) else cfg[0]


def _ends(model: nn.Module) -> tuple[str, ...]:
    cfg = model.pretrained_cfg["classifier"]
    return (cfg,) if isinstance(cfg, str) else tuple(cfg)


def test_doubled_resnet_is_timms_own() -> None:
    with torch.device("meta"):
        model, own = timm.create_model("resnet18"), timm.create_model("resnet18", base_width=64, stem_width=64)
    wide, _ = widen(model, Coupling(model, trace(model, (3, 64, 64))), 2.0, (3, 64, 64))
    for (name, p), q in zip(wide.named_parameters(), own.parameters(), strict=True):
        doubled = [2 * n if n not in (3, 1, 7, 1000) else n for n in q.shape]
        assert list(p.shape) == doubled, name
    assert (wide.num_features, wide.fc.in_features) == (1024, 1024)
    assert [info["num_chs"] for info in wide.feature_info] == [128, 128, 256, 512, 1024]


def test_widened_twice_as_a_transformer() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    wide, _ = widen(model, Coupling(model, trace(model, (3, 32, 32))), 2.0, (3, 32, 32))
    attention = wide.blocks[0].attn
    assert (attention.num_heads, attention.qkv.out_features, wide.pos_embed.shape[-1]) == (6, 3 * 384, 384)
    assert wide(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    assert wide.pos_embed.std().item() == pytest.approx(model.pos_embed.std().item(), rel=0.1)
    assert torch.equal(wide.norm.weight, torch.ones(384))


class Odd(nn.Module):
    """Relies on a number that tracing cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x.reshape(len(x), 2, 8).flip(1).reshape(len(x), 16))


def test_what_cannot_be_followed_is_refused_with_the_reason() -> None:
    net = Odd()
    with pytest.raises(WidenError, match=r"widths depend on each other.*shape '\[1, 2, 8\]' is invalid"):
        widen(net, Coupling(net, trace(net, (4,))), 2.0, (4,))
    with pytest.raises(ValueError, match="sparse_wide cannot widen Odd: its widths depend"):
        convert(net, "sparse_wide:0.75", input_size=(4,), filter=lambda m, n: n == "first")


def test_widths_fixed_by_unknown_ops_stay() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).sort(-1)[0]))

    net = Sorted()
    wide, _ = widen(net, Coupling(net, trace(net, (4,))), 2.0, (4,))
    assert [tuple(m.weight.shape) for m in (wide.a, wide.b, wide.c)] == [(16, 4), (64, 16), (4, 64)]
    assert "op sort has no rule (op sort of the model)" in Coupling(net, trace(net, (4,))).widths.reasons.values()
