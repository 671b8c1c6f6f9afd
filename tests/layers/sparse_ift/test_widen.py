"""Followed widths against rebuilt networks."""

import pytest
import timm
import torch
from torch import Tensor, nn

from revnets.layers import convert
from revnets.layers.sparse_ift.widen import WidenError, widen
from revnets.layers.sparse_ift.widen_rules import couple
from revnets.layers.trace import trace

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
    wide, again = widen(model, couple(model, recorded), factor, size)
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
    wide, _ = widen(model, couple(model, trace(model, (3, 64, 64))), 2.0, (3, 64, 64))
    for (name, p), q in zip(wide.named_parameters(), own.parameters(), strict=True):
        doubled = [2 * n if n not in (3, 1, 7, 1000) else n for n in q.shape]
        assert list(p.shape) == doubled, name
    assert (wide.num_features, wide.fc.in_features) == (1024, 1024)
    assert [info["num_chs"] for info in wide.feature_info] == [128, 128, 256, 512, 1024]


def test_widened_twice_as_a_transformer() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    wide, _ = widen(model, couple(model, trace(model, (3, 32, 32))), 2.0, (3, 32, 32))
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
        widen(net, couple(net, trace(net, (4,))), 2.0, (4,))
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
    wide, _ = widen(net, couple(net, trace(net, (4,))), 2.0, (4,))
    assert [tuple(m.weight.shape) for m in (wide.a, wide.b, wide.c)] == [(16, 4), (64, 16), (4, 64)]
    assert "op sort has no rule (op sort of the model)" in couple(net, trace(net, (4,))).widths.reasons.values()
