"""Munit-scaled transformers: variances at the start, weighted residuals, reversible siblings, FP8, transfer rules."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revnets
from revnets.layers import MuSConv2d, MuSLinear
from revnets.models._mus_vit_parts import MuSBlock, residual_weight
from revnets.models.mus_vit import MuSVisionTransformer
from tests.helpers import assert_same_step, training_step
from tests.models.registry import TINY_TRANSFORMERS, images, make, relative

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")
PLAIN, REVERSIBLE = TINY_TRANSFORMERS


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# --- variances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("residual", ["fixed", "mean"])
def test_unit_variance_through_the_depth(width: int, residual: str) -> None:
    depth = 8
    model = make(PLAIN, embed_dim=width, num_heads=width // 32, depth=depth, residual=residual, num_classes=10).train()
    sizes: list[float] = []
    streams: list[Tensor] = []

    def look(block: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        streams.append(output)

    for block in model.blocks:
        block.register_forward_hook(look)
        for branch in (block.norm1, block.norm2):
            branch.register_forward_hook(lambda module, args, output: sizes.append(rms(output)))
    tokens = model.forward_features(images(8))
    tokens.backward(torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)))
    assert sizes == pytest.approx([1.0] * (2 * depth), abs=0.02)
    assert [rms(stream) for stream in streams] == pytest.approx([1.0] * depth, abs=0.15)
    for stream in streams:
        assert stream.grad is not None
        assert 0.5 < rms(stream.grad) < 2
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert rms(parameter) == pytest.approx(1, abs=0.1), name


def test_other_parameterisations_fail_the_same_check() -> None:
    """A plain sum, as in timm's block, makes the stream grow; small embeddings make it start small."""
    model = make(PLAIN, depth=8)
    x = model._pos_embed(model.patch_embed(images()))
    for block in model.blocks:
        x = x + block.norm1(block.attn(x))
        x = x + block.norm2(block.mlp(x))
    assert rms(x) > 2
    nn.init.zeros_(model.patch_embed.proj.weight)
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    assert rms(model._pos_embed(model.patch_embed(images()))[:, 1:]) < 0.5


@pytest.mark.parametrize("t", [0.05, 0.4])
def test_weighted_residual_keeps_variance(t: float) -> None:
    torch.manual_seed(0)
    block = MuSBlock(64, 2).eval()
    block.residual = (t, 0.5)
    block.attn = nn.Identity()
    block.mlp = block.norm2 = nn.Identity()
    block.norm1.register_forward_hook(lambda module, args, output: torch.randn_like(output))
    x = torch.randn(8, 100, 64)
    expected = 2 * math.sqrt(0.5)  # the second branch is the identity: the same term twice
    assert rms(block(x)) == pytest.approx(expected, rel=0.02)


def test_embedding_and_logits() -> None:
    model = make(PLAIN, img_size=32, patch_size=4, embed_dim=512, num_heads=8, depth=1, num_classes=1000).eval()
    with torch.no_grad():
        x = torch.randn(16, 3, 32, 32)
        assert rms(model.patch_embed(x)) == pytest.approx(1, abs=0.05)
        assert rms(model._pos_embed(model.patch_embed(x))) == pytest.approx(1, abs=0.05)
        logits = model(x)
        assert rms(logits) == pytest.approx(512**-0.5, rel=0.2)
        model.output_mult = 3.0
        torch.testing.assert_close(model(x), 3 * logits)


def test_residual_weights() -> None:
    assert residual_weight(1, 4) == residual_weight(8, 4) == 0.4
    assert residual_weight(1, 64) == pytest.approx(0.1)
    falling = [residual_weight(1, depth) for depth in range(1, 100)]
    assert falling == sorted(falling, reverse=True)
    assert max(falling) == 0.5
    # running mean: after L branches, the input and every branch have the same weight
    weights = [1.0]
    for branch in range(1, 7):
        t = residual_weight(branch, 3, "mean")
        weights = [w * (1 - t) for w in weights] + [t]
    assert weights == pytest.approx([1 / 7] * 7)
    for wrong in ("median", 0.0, 1.0, -1):
        with pytest.raises(ValueError, match=r"residual=.*'fixed', 'mean', or a share"):
            make(PLAIN, residual=wrong)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_TRANSFORMERS)
@pytest.mark.parametrize("layers", ["mus", "mus_fp8:backend:emulate", {"type": "mus_fp8", "grad_scale": 256.0}])
def test_layers(name: str, layers: Any) -> None:
    model = make(name, layers=layers, num_classes=10)
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert all(isinstance(m, MuSLinear | MuSConv2d) for m in found.values())
    roles = {n: m.role for n, m in found.items()}
    assert roles.pop("patch_embed.proj") == "input"
    assert roles.pop("head") == "output"
    assert set(roles.values()) == {"hidden"}
    assert len(roles) == 4 * 4
    for n, m in found.items():
        assert m.fp8 == (layers != "mus" and m.role == "hidden"), n
        if isinstance(layers, dict) and m.fp8:
            assert m.grad_scale == 256
    model.reset_classifier(7)
    assert isinstance(model.head, MuSLinear)
    assert (model.head.role, model.head.fp8, model.head.scale) == ("output", False, 1 / 64)


@pytest.mark.parametrize("layers", ["sparse:0.75", "sparse:0.75+mus_fp8", ["mus", "mus_fp8"]])
def test_other_layers_are_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"expected 'mus' or 'mus_fp8' alone.*revnets\.convert"):
        make(PLAIN, layers=layers)


def test_roles() -> None:
    model = make(PLAIN, layers={"type": "mus_fp8", "roles": {"blocks.0.attn.qkv": "output"}})
    assert (model.blocks[0].attn.qkv.role, model.blocks[0].attn.qkv.fp8) == ("output", False)
    with pytest.raises(ValueError, match=r"roles names 'blocks\.9\.fc': expected a linear layer, such as"):
        make(PLAIN, layers={"type": "mus", "roles": {"blocks.9.fc": "input"}})


@pytest.mark.parametrize("name", TINY_TRANSFORMERS)
def test_fp8_is_close_to_higher_precision(name: str) -> None:
    plain, fp8 = make(name, num_classes=10), make(name, num_classes=10, layers="mus_fp8")
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), fp8.state_dict().values(), strict=True))
    x = images(4)
    with torch.no_grad():
        a, b = (model.eval().forward_features(x) for model in (plain, fp8))
    assert 0 < rms(b - a) / rms(a) < 0.1
    grads = []
    for model in (plain, fp8):
        model.train().forward_features(x).square().mul(torch.linspace(-1, 1, 64)).mean().backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "head" not in n]))
    assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.97


def test_sizes_of_images_and_patches() -> None:
    model = make("mus_vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=2, num_heads=2).eval()
    assert model.pos_embed.shape == (1, 65, 96)
    x = images(size=32)
    patches = x.reshape(2, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).reshape(128, 3, 4, 4)
    enlarged = nn.functional.interpolate(patches, scale_factor=2, mode="bicubic", antialias=True)
    enlarged = enlarged.reshape(2, 8, 8, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        model.set_input_size(img_size=(64, 64), patch_size=(8, 8))
        assert relative(model(enlarged), expected) < 1e-4
    assert isinstance(model.patch_embed.proj, MuSConv2d)
    assert model.patch_embed.proj.role == "input"
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(x)


@pytest.mark.parametrize("name", TINY_TRANSFORMERS)
@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg", "class_token": False},
        {"reg_tokens": 2, "no_embed_class": True},
        {"num_classes": 0, "global_pool": ""},
        {"pos_embed": "none", "in_chans": 1},
        {"dynamic_img_size": True},
    ],
    ids=str,
)
def test_options_of_timm(name: str, options: dict[str, Any]) -> None:
    model, x = make(name, **options).train(), images(in_chans=options.get("in_chans", 3))
    model(x).square().mean().backward()
    missing = {n for n, p in model.named_parameters() if p.grad is None}
    assert not missing
    assert model.eval()(x).isfinite().all()


def test_checkpoints_of_another_size(tmp_path: Any) -> None:
    torch.save(make(PLAIN).state_dict(), tmp_path / "weights.pth")
    file = {"file": str(tmp_path / "weights.pth")}
    model = make(PLAIN, pretrained=True, pretrained_cfg_overlay=file, img_size=128, num_classes=1000)
    assert model.pos_embed.shape == (1, 65, 64)
    assert model(images(size=128)).shape == (2, 1000)


# --- reversible ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layers", ["mus", "mus_fp8"])
def test_three_modes_are_the_same_to_the_bit(layers: str, autocast: bool) -> None:
    model = make(REVERSIBLE, layers=layers, num_classes=10, depth=6, drop_path_rate=0.2, proj_drop_rate=0.1).train()
    steps = {
        mode: training_step(model, (images(4),), lambda y: y.float().square().mean(), mode, autocast=autocast)
        for mode in ("store", "checkpoint", "reversible")
    }
    assert all(grad is not None and grad.isfinite().all() for grad in steps["store"].grads.values())
    for mode in ("checkpoint", "reversible"):
        assert_same_step(steps[mode], steps["store"], relative=0)


def test_modes_are_close_without_the_grid() -> None:
    model = make(REVERSIBLE, num_classes=10, exact=False).double().train()
    x = images(4).double()
    store, rebuilt = (training_step(model, (x,), lambda y: y.square().mean(), m) for m in ("store", "reversible"))
    assert_same_step(rebuilt, store, relative=1e-10)


@pytest.mark.parametrize("residual", ["fixed", "mean"])
def test_streams_are_those_of_the_weighted_residual(residual: str) -> None:
    """The streams without factors, scaled where they are read, are x' = sqrt(1-t) x + sqrt(t) f(x)."""
    model = make(REVERSIBLE, residual=residual, depth=5).double().eval()
    x = images().double()
    with torch.no_grad():
        x1, x2 = model._embed(x)
        for index, op in enumerate(model.blocks.ops):
            t = residual_weight(index + 1, 5, residual)
            x2 = (1 - t) ** 0.5 * x2 + t**0.5 * op.f.norm(op.f.fn(x1))
            x1 = (1 - t) ** 0.5 * x1 + t**0.5 * op.g.norm(op.g.fn(x2))
            (merged,) = model.forward_intermediates(x, [index], intermediates_only=True, output_fmt="NLC")
            share = model._gains[index + 1] ** 2  # of the embedded image, which both streams have
            expected = (x1 + x2) / (2 * (1 + share)) ** 0.5
            torch.testing.assert_close(merged, expected[:, 1:])
            assert rms(x1) == pytest.approx(1, abs=0.15)
            assert rms(merged) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("layers", ["mus", "mus_fp8"])
def test_rebuilt_activations_are_exact(layers: str) -> None:
    report = revnets.check_reversibility(make(REVERSIBLE, layers=layers, depth=12).train(), images())
    assert report.exact


def test_intermediates_in_training_are_rebuilt_too() -> None:
    model = make(REVERSIBLE, num_classes=0).train()
    x = images()
    steps = []
    for mode in ("store", "reversible"):
        model.set_mode(mode)
        model.zero_grad()
        final, maps = model.forward_intermediates(x, (0, 2))
        (final.square().mean() + sum(m.square().mean() for m in maps)).backward()
        steps.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


def test_masks_are_refused() -> None:
    model = make(REVERSIBLE).eval()
    with pytest.raises(ValueError, match="takes no attention mask: use MuSVisionTransformer"):
        model.forward_features(images(), is_causal=True)
    assert make(PLAIN).eval().forward_features(images(), is_causal=True).shape == (2, 17, 64)


# --- transfer rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_TRANSFORMERS)
def test_transfer_rules(name: str) -> None:
    model: MuSVisionTransformer = make(name, embed_dim=256, num_heads=8, num_classes=10)
    groups = revnets.mus_param_groups(model, 0.1, 1e-4, base_width=64, width=model.embed_dim)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(rates) == set(names.values())
    for n, (lr, decay) in rates.items():
        hidden = n.endswith("weight") and any(word in n for word in (".qkv.", ".proj.", ".fc1.", ".fc2.", ".fn."))
        hidden = hidden and n != "patch_embed.proj.weight"
        assert lr == pytest.approx(0.05 if hidden else 0.1), n
        decays = model.get_parameter(n).dim() > 1 and n not in ("pos_embed", "cls_token")
        assert decay == pytest.approx(1e-4 / lr if decays else 0), n


def test_wider_networks_move_alike_under_the_rules() -> None:
    """One step of sign descent changes the features by a like amount at every width; without the rules it grows."""
    changes: dict[bool, list[float]] = {True: [], False: []}
    for width in (64, 512):
        start = make(PLAIN, embed_dim=width, num_heads=width // 32, depth=2, num_classes=10)
        for rules, found in changes.items():
            model, x = copy.deepcopy(start), images(8)
            groups = revnets.mus_param_groups(model, 0.01, 0, 64 if rules else width, width)
            before = model.forward_features(x)
            nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
            with torch.no_grad():
                for group in groups:
                    for parameter in group["params"]:
                        if any(parameter is layer.weight for layer in model.modules() if _hidden(layer)):
                            parameter -= group["lr"] * parameter.grad.sign()
                found.append(rms(model.forward_features(x) - before))
    assert 0.5 < changes[True][1] / changes[True][0] < 2
    assert changes[False][1] > 1.3 * changes[True][1]


def _hidden(layer: nn.Module) -> bool:
    return isinstance(layer, MuSLinear) and layer.role == "hidden"
