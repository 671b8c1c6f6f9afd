"""What timm's users and timm's own tests expect of any model, for every registered name."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import DropPath, freeze_batch_norm_2d
from timm.layers import convert_sync_batchnorm as timm_convert_sync_batchnorm
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import revnets
from tests.models.registry import (
    NAMES,
    REVBIFPN,
    TINY,
    TINY_TRANSFORMERS,
    TRANSFORMERS,
    absolute,
    images,
    make,
    meta_model,
    meta_outputs,
    own_images,
    parametrize_by_cost,
    relative,
    unpooled_shape,
    with_statistics,
)

OUT_INDICES = [1, 3, (0,), (1, 3), (-1,), (-2, 0), (3, 1), (2, 2), (0, 1, 2, 3)]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the registry ----------------------------------------------------------------------------------------------------


def test_published_variants_are_registered() -> None:
    assert set(NAMES) == {*REVBIFPN, *TRANSFORMERS}
    assert set(REVBIFPN) == {TINY, *(f"revbifpn_s{n}" for n in range(7))}
    sizes = ("tiny", "small", "base")
    transformers = {f"{prefix}mus_vit_{size}_patch16_224" for prefix in ("", "rev_") for size in sizes}
    assert set(TRANSFORMERS) == {*TINY_TRANSFORMERS, *transformers}
    assert timm.list_models("revbifpn*") == [f"revbifpn_s{n}" for n in range(7)]
    assert timm.list_models("revbifpn*", pretrained=True) == [f"revbifpn_s{n}.imagenet1k" for n in range(7)]
    assert timm.is_model_pretrained("revbifpn_s0")
    assert not timm.is_model_pretrained(TINY)


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg(name: str) -> None:
    model = meta_model(name)
    cfg = model.pretrained_cfg
    assert model.default_cfg is cfg
    assert cfg["architecture"] == name
    state = model.state_dict().keys()
    assert f"{cfg['classifier']}.weight" in state
    if name in REVBIFPN:
        assert cfg["first_conv"] == ()  # the stem has no weights
        assert all(side % least == 0 for side, least in zip(cfg["input_size"], cfg["min_input_size"], strict=True))
    else:
        assert f"{cfg['first_conv']}.weight" in state
    assert cfg["num_classes"] == model.num_classes == 1000
    assert len(cfg["input_size"]) == 3
    assert cfg["input_size"][0] == model.in_chans == 3
    assert cfg["fixed_input_size"] is (name in TRANSFORMERS)
    assert 0 < cfg["crop_pct"] <= 1
    assert cfg["interpolation"] in ("bicubic", "bilinear")
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["license"] == "apache-2.0"
    if timm.is_model_pretrained(name):
        assert cfg["url"].endswith(f"/{name}.pth.tar")
        assert int(cfg["sha256"], 16) < 2**256
        assert len(cfg["sha256"]) == 64


@pytest.mark.parametrize("name", NAMES)
def test_data_config(name: str) -> None:
    model = meta_model(name)
    config = resolve_model_data_config(model)
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct"):
        assert config[key] == model.pretrained_cfg[key]
    transform = timm.data.create_transform(**config, is_training=False)
    assert transform is not None


def test_tag_selects_the_same_model() -> None:
    with torch.device("meta"):
        model = timm.create_model("revbifpn_s0.imagenet1k")
    assert model.pretrained_cfg["tag"] == "imagenet1k"


# --- shapes, at the model's own image size, without computing anything -----------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_output_shapes(name: str) -> None:
    model, features = meta_model(name), meta_outputs(name)[0]
    assert tuple(features.shape) == unpooled_shape(model)
    assert tuple(model.forward_head(features, pre_logits=True).shape) == (1, model.head_hidden_size)
    assert tuple(model.forward_head(features).shape) == (1, 1000)


@pytest.mark.parametrize("name", NAMES)
def test_feature_info_describes_the_maps(name: str) -> None:
    model, maps = meta_model(name), meta_outputs(name)[1]
    assert len(maps) == len(model.feature_info)
    modules = dict(model.named_modules())
    side = model.pretrained_cfg["input_size"][-1]
    for features, info in zip(maps, model.feature_info, strict=True):
        assert tuple(features.shape) == (1, info["num_chs"], side // info["reduction"], side // info["reduction"])
        assert info["module"] in modules


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", [TINY, "revbifpn_s0", "revbifpn_s1"])
def test_in_chans(name: str, in_chans: int) -> None:
    model = make(name, in_chans=in_chans, num_classes=10).eval()
    assert model.in_chans == in_chans
    held = meta_model(name).body.ops[0].out_chans // model.stem_stride**2  # copies of channels that make the finest map
    assert (model.stem is None) == (in_chans <= held)
    with torch.no_grad():
        logits = model(images(in_chans=in_chans))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def test_more_channels_than_the_stem_holds_use_a_strided_convolution() -> None:
    model = make("revbifpn_s0", in_chans=5, num_classes=10)
    assert isinstance(model.stem, nn.Conv2d)
    assert make("revbifpn_s0", in_chans=3, num_classes=10).stem is None
    assert set(gradients(model.train(), images(in_chans=5))) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("name", [TINY, "revbifpn_s0", "revbifpn_s1"])
def test_stem_stride(name: str, stem_stride: int) -> None:
    model = make(name, stem_stride=stem_stride).eval()
    with torch.no_grad():
        final, maps = model.forward_intermediates(images(1, size=32))
    assert [info["reduction"] for info in model.feature_info] == [stem_stride * 2**k for k in range(4)]
    assert [f.shape[-1] for f in maps] == [32 // stem_stride // 2**k for k in range(4)]
    assert final.shape[-1] == 32 // stem_stride // 8


@pytest.mark.parametrize("size", [(32, 96), (128, 64)])
def test_oblong_images(size: tuple[int, int]) -> None:
    with torch.no_grad():
        features = make("revbifpn_s0").eval().forward_features(torch.zeros(3, 3, *size))
    assert tuple(features.shape[-2:]) == (size[0] // 32, size[1] // 32)


@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", "catavgmax", "fast"])
def test_global_pool(global_pool: str) -> None:
    model = make(TINY, global_pool=global_pool, num_classes=10).eval()
    assert model(images()).shape == (2, 10)


def test_no_global_pool() -> None:
    model = make(TINY, global_pool="", num_classes=0).eval()
    assert torch.equal(model(images()), model.forward_features(images()))


# --- outputs and gradients -------------------------------------------------------------------------------------------


@parametrize_by_cost()
def test_forward_is_finite(name: str) -> None:
    model = make(name).eval()
    with torch.no_grad():
        logits = model(own_images(name))
    assert logits.shape == (2, model.num_classes)
    assert logits.isfinite().all()


@parametrize_by_cost()
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = make(name, num_classes=42).train()
    grads = gradients(model, own_images(name))
    assert set(grads) == {name for name, _ in model.named_parameters()}
    for parameter, grad in grads.items():
        assert grad.isfinite().all(), parameter


@parametrize_by_cost()
def test_grad_checkpointing_keeps_the_step(name: str) -> None:
    reversible = hasattr(meta_model(name), "set_mode")
    mode = {"mode": "store"} if reversible else {}
    model, x = make(name, num_classes=10, drop_rate=0.0, drop_path_rate=0.0, **mode).train(), own_images(name)
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    assert checkpointed.mode == "checkpoint" if reversible else checkpointed.grad_checkpointing
    expected, grads = gradients(model, x), gradients(checkpointed, x)
    for parameter, grad in expected.items():
        torch.testing.assert_close(grads[parameter], grad, msg=lambda text, name=parameter: f"{name}: {text}")
    torch.testing.assert_close(checkpointed.state_dict(), model.state_dict())
    checkpointed.set_grad_checkpointing(False)
    assert checkpointed.mode == "store" if reversible else not checkpointed.grad_checkpointing


@pytest.mark.parametrize("name", [TINY, "test_rev_mus_vit"])
def test_grad_checkpointing_leaves_reversible_mode_alone(name: str) -> None:
    model = make(name)
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert model.mode == "reversible"
    model.set_reversible(False)
    assert model.mode == "store"
    model.set_reversible()
    assert model.mode == "reversible"


def test_drop_rate() -> None:
    model = make(TINY, drop_rate=0.5).train()
    assert model.drop_rate == model.head_drop.p == 0.5
    model.reset_classifier(10)
    assert model.head_drop.p == 0.5
    features = torch.ones(2, model.num_features, 4, 4)
    dropped = model.forward_head(features, pre_logits=True)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    assert (model.eval().forward_head(features, pre_logits=True) == 1).all()


def test_drop_path_rate_grows_and_spares_new_scales() -> None:
    model = make(TINY, drop_path_rate=0.3, extra_silos=1)
    stages = 4
    for name, module in model.named_modules():
        if not name.endswith("drop_path"):
            continue
        in_body = name.startswith("body")
        stage = (int(name.split(".")[2]) - (model.stem is None)) // 3 + 1 if in_body else 0
        makes_new_scale = in_body and ".down." in name and stage < stages and f"_{stage}.drop" in name
        if in_body and not makes_new_scale:
            assert isinstance(module, DropPath), name
            assert module.drop_prob == pytest.approx(0.3 * stage / stages), name
        else:
            assert isinstance(module, nn.Identity), name


def test_drop_path_changes_training_only() -> None:
    plain, dropping = make(TINY, drop_path_rate=0.0), make(TINY, drop_path_rate=0.5)
    x = images(8)
    assert torch.equal(plain.eval()(x), dropping.eval()(x))
    assert not torch.equal(plain.train()(x), dropping.train()(x))


@parametrize_by_cost()
def test_channels_last(name: str) -> None:
    model = with_statistics(make(name, num_classes=10))
    x = own_images(name)
    with torch.no_grad():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        assert relative(model(x.to(memory_format=torch.channels_last)), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [TINY, "revbifpn_s0"])
def test_low_precision_eval(name: str, dtype: torch.dtype) -> None:
    model = with_statistics(make(name, num_classes=10))
    with torch.no_grad():
        expected = model(images())
        logits = model.to(dtype)(images().to(dtype))
    assert logits.dtype == dtype
    assert relative(logits, expected) < (0.02 if dtype == torch.float16 else 0.15)


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_indices", OUT_INDICES, ids=str)
@pytest.mark.parametrize("name", [TINY, pytest.param("revbifpn_s0", marks=pytest.mark.slow)])
def test_features_only(name: str, out_indices: int | tuple[int, ...]) -> None:
    model = with_statistics(make(name))
    backbone = make(name, features_only=True, out_indices=out_indices)
    result = backbone.model.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys
    x = images()
    take = absolute(out_indices)
    with torch.no_grad():
        maps = backbone.eval()(x)
        pyramid = model.forward_pyramid(x)
        final, intermediates = model.forward_intermediates(x, indices=out_indices)
        only = model.forward_intermediates(x, indices=out_indices, intermediates_only=True)
        assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(take)
    for k, *same in zip(take, maps, intermediates, only, strict=True):
        assert all(torch.equal(features, pyramid[k]) for features in same)
    assert backbone.feature_info.channels() == [m.shape[1] for m in maps]
    assert backbone.feature_info.reduction() == [x.shape[-1] // m.shape[-1] for m in maps]
    assert backbone.feature_info.module_name() == [f"neck.blocks.{k}" for k in take]


@pytest.mark.parametrize("out_indices", [2, (0,), (-1,), (2, 0), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", TINY_TRANSFORMERS)
def test_features_only_of_transformers(name: str, out_indices: int | tuple[int, ...]) -> None:
    model = make(name).eval()
    backbone = make(name, features_only=True, out_indices=out_indices)
    assert not backbone.model.load_state_dict(model.state_dict(), strict=False).missing_keys
    x, take = images(), sorted(absolute(out_indices))
    with torch.no_grad():
        maps = backbone.eval()(x)
        final, same = model.forward_intermediates(x, indices=out_indices)
        normed = model.forward_intermediates(x, output_fmt="NLC", norm=True, return_prefix_tokens=True)[1]
    assert torch.equal(final, model.forward_features(x))
    assert all(torch.equal(a, b) for a, b in zip(maps, same, strict=True))
    assert [m.shape for m in maps] == [(2, 64, 4, 4)] * len(take)
    last = torch.cat(normed[-1][::-1], 1)
    assert torch.equal(last, final), "the last block, normed, with its class token"
    backbone.train()
    sum(m.square().mean() for m in backbone(x)).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_features_only_defaults_to_all_maps() -> None:
    backbone = make(TINY, features_only=True).eval()
    assert backbone.feature_info.out_indices in ((0, 1, 2, 3), [0, 1, 2, 3])
    assert [m.shape[-1] for m in backbone(images())] == [32, 16, 8, 4]


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "store"])
def test_features_only_takes_modes(mode: str) -> None:
    backbone = make(TINY, features_only=True)
    revnets.set_mode(backbone, mode)
    assert backbone.model.mode == backbone.model.neck.mode == mode
    assert make(TINY, features_only=True, mode=mode).model.mode == mode


def test_features_only_is_not_affected_by_earlier_calls() -> None:
    """timm changes the `feature_cfg` that it is given."""
    make(TINY, features_only=True, out_indices=(1,))
    assert len(make(TINY, features_only=True).eval()(images())) == 4


@pytest.mark.parametrize("out_indices", [(0,), (1,), (2,), (3,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_features_only_trains_every_parameter_it_has(out_indices: tuple[int, ...]) -> None:
    """So that DDP needs no `find_unused_parameters`."""
    backbone = make(TINY, features_only=True, out_indices=out_indices).train()
    names = {name for name, _ in backbone.named_parameters()}
    assert not any(part in name for name in names for part in ("head", "classifier"))
    sum(m.square().mean() for m in backbone(images())).backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is not None} == names


def test_features_by_hooks() -> None:
    model = with_statistics(make(TINY))
    backbone = make(TINY, features_only=True, feature_cls="hook", out_indices=(0, 2))
    backbone.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        maps, pyramid = with_statistics(backbone)(images()), model.forward_pyramid(images())
    assert [torch.equal(m, pyramid[k]) for m, k in zip(maps, (0, 2), strict=True)] == [True, True]


@pytest.mark.parametrize("out_indices", [(4,), (-5,), 5, 0])
def test_out_indices_out_of_range(out_indices: int | tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="out of range"):
        make(TINY, features_only=True, out_indices=out_indices)


# --- optimisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_group_matcher_covers_every_parameter_in_order(name: str, coarse: bool) -> None:
    model = meta_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    order = [parameter for index in sorted(groups) for parameter in groups[index]]
    assert order == [name for name, _ in model.named_parameters()]
    assert groups[max(groups)] == [f"{model.pretrained_cfg['classifier']}.{leaf}" for leaf in ("weight", "bias")]
    if name in TRANSFORMERS:
        assert len(groups) == len(model.feature_info) + 2  # embeddings, classifier; the norm joins the last block
        return
    stages = [op for op in model.body.ops if next(op.parameters(), None) is not None]
    assert len(groups) == (len(stages) // 3 if coarse else len(stages)) + 2  # neck with head, classifier


@pytest.mark.parametrize("in_chans", [3, 5])
def test_layer_decay(in_chans: int) -> None:
    model = make("revbifpn_s0", in_chans=in_chans)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.9)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert set(scales) == set(names.values())
    assert scales["classifier.weight"] == 1
    in_order = [scales[name] for name in names.values()]
    assert in_order == sorted(in_order)
    assert len(set(in_order)) == 15 + 2 + (in_chans == 5)
    if in_chans == 5:
        assert scales["stem.weight"] < scales["body.ops.0.ops.0.f.conv_dw.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_norms_and_biases_only(name: str) -> None:
    model = meta_model(name)
    absent = set(model.no_weight_decay()) - {name for name, _ in model.named_parameters()}
    assert absent <= {"reg_token", "dist_token"}  # timm's transformers name all that there may be
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.05)
    spared = {id(p) for name, p in model.named_parameters() if p.ndim <= 1 or name in model.no_weight_decay()}
    for group in optimizer.param_groups:
        assert all((id(p) not in spared) == (group["weight_decay"] > 0) for p in group["params"])


# --- copies and files ------------------------------------------------------------------------------------------------


def through_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("copied", [through_deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("name", [TINY, *TINY_TRANSFORMERS])
def test_copies_give_the_same_outputs(name: str, copied: Any, trained: bool) -> None:
    model = make(name)
    if trained:
        gradients(model.train(), images())
    other = copied(model).eval()
    with torch.no_grad():
        assert torch.equal(other(images()), model.eval()(images()))
    assert other.pretrained_cfg == model.pretrained_cfg
    assert set(gradients(other.train(), images())) == {name for name, _ in model.named_parameters()}


def test_state_dict_file(tmp_path: Path) -> None:
    model = with_statistics(make(TINY))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = timm.create_model(TINY).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_checkpoint_path(tmp_path: Path, wrap: Any) -> None:
    model = with_statistics(make(TINY))
    torch.save(wrap(model.state_dict()), tmp_path / "checkpoint.pth")
    other = timm.create_model(TINY, checkpoint_path=str(tmp_path / "checkpoint.pth")).eval()
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


def test_state_dict_does_not_depend_on_mode() -> None:
    states = [
        make(TINY, mode=mode, exact=exact).state_dict() for mode in ("reversible", "store") for exact in (False, 10)
    ]
    assert all(state.keys() == states[0].keys() for state in states)


# --- batch norms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm_convert_sync_batchnorm])
def test_sync_batch_norm_in_eval(convert: Any) -> None:
    model = with_statistics(make(TINY))
    with torch.no_grad():
        expected = model(images())
        converted = convert(model)
        assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
        assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
        assert relative(converted(images()), expected) < 1e-6


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "store"])
def test_frozen_batch_norms_in_a_training_step(mode: str) -> None:
    model = with_statistics(make(TINY, mode=mode, exact=False))
    expected = model(images()).detach()
    frozen = freeze_batch_norm_2d(model).train()
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    assert relative(frozen(images()).detach(), expected) < 1e-5
    grads = gradients(frozen, images())
    assert set(grads) == {name for name, _ in frozen.named_parameters()}
    assert all(grad.isfinite().all() for grad in grads.values())
    assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())
