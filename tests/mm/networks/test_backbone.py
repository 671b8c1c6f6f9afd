"""Backbones for MMDetection: timm's features on the same weights, frozen stages, norms, memory modes, weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")

import revnets.mm
from revnets.layers import is_lean
from revnets.mm.networks.backbone import RevBiFPN, TimmBackbone
from revnets.profiling import predict_training_step

TINY = {"type": "RevBiFPN", "arch": "test"}
STAGES = 3  # of the body of the tiny variant


def build(**kwargs: Any) -> Any:
    """By its name, as a config does."""
    from mmdet.registry import MODELS

    torch.manual_seed(0)
    return MODELS.build(kwargs)


def images(size: int = 32, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, size, size)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    sum(y.square().mean() for y in model(x)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


# --- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2, 3), (3,), (0, 2)])
def test_features_equal_timms_on_the_same_weights(out_indices: tuple[int, ...], training: bool) -> None:
    backbone = build(**TINY, out_indices=out_indices)
    reference = timm.create_model("test_revbifpn", features_only=True, out_indices=out_indices)
    reference.load_state_dict(backbone.net.state_dict())
    expected = reference.train(training)(images())
    found = backbone.train(training)(images())
    assert isinstance(found, tuple)
    assert len(found) == len(out_indices)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert backbone.out_channels == reference.feature_info.channels()


@pytest.mark.parametrize("name", ["resnet18", "hrnet_w18_small", "efficientnet_b0", "convnext_atto"])
def test_networks_of_timm(name: str) -> None:
    backbone = build(type="TimmBackbone", model_name=name, out_indices=(1, 2, 3), norm_eval=True).eval()
    reference = timm.create_model(name, features_only=True, out_indices=(1, 2, 3))
    reference.load_state_dict(backbone.net.state_dict())
    for a, b, stride in zip(backbone(images()), reference.eval()(images()), backbone.strides, strict=True):
        assert torch.equal(a, b)
        assert a.shape[-1] == 32 // stride


def test_fewer_levels_need_no_more_memory() -> None:
    peaks = [
        predict_training_step(
            build(**TINY, out_indices=levels), images(), lambda ys: sum(y.square().mean() for y in ys)
        ).step_bytes
        for levels in ((0, 1, 2, 3), (0, 1, 2), (1, 2, 3))
    ]
    assert max(peaks[1:]) <= peaks[0]


# --- frozen stages and norms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_stages", range(-1, STAGES + 2))
def test_frozen_stages(frozen_stages: int) -> None:
    backbone = build(**TINY, frozen_stages=frozen_stages)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    outputs = backbone(images())
    everything = frozen_stages == STAGES + 1
    assert all(y.requires_grad is not everything for y in outputs)
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (_stage(name) > frozen_stages), name
    for name, grad in ({} if everything else gradients(backbone, images())).items():
        assert (grad is None) == (_stage(name) <= frozen_stages), name
    for name, value in backbone.state_dict().items():
        if name.endswith("running_mean"):
            assert torch.equal(value, before[name]) == (_stage(name) <= frozen_stages), name


def _stage(name: str) -> int:
    """Of a key of the tiny variant: 2 rounds of blocks and a silo per stage, after the stem's unfolding; then the neck.

    >>> _stage("net.model.body.ops.1.ops.0.f.conv_dw.weight"), _stage("net.model.neck.blocks.0.bn2.weight")
    (1, 4)
    """
    parts = name.split(".")
    return (int(parts[4]) - 1) // 3 + 1 if parts[2] == "body" else STAGES + 1


@pytest.mark.parametrize("frozen_stages", [0, 1, 2, 3])
def test_frozen_stages_have_the_gradients_of_storing(frozen_stages: int) -> None:
    found = [gradients(build(**TINY, frozen_stages=frozen_stages, mode=m), images()) for m in ("reversible", "store")]
    for name, grad in found[0].items():
        assert (grad is None and found[1][name] is None) or torch.equal(grad, found[1][name]), name


def test_frozen_stages_of_a_network_of_timm() -> None:
    backbone = build(type="TimmBackbone", model_name="resnet18", frozen_stages=1)
    frozen = {name.split(".")[1] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    assert not backbone.net.layer1[0].bn1.training
    assert backbone.net.layer2[0].bn1.training


def test_frozen_stages_freeze_converted_layers() -> None:
    backbone = build(
        type="TimmBackbone", model_name="convnext_atto", frozen_stages=2, layers="sparse_doped:0.75", out_indices=(1, 3)
    )
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"stages_2", "stages_3"}


def test_norm_eval_keeps_statistics() -> None:
    backbone = build(**TINY, norm_eval=True).train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    grads = gradients(backbone, images())
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    assert all(grad is not None for grad in grads.values())


NORMS = [None, {"type": "BN"}, {"type": "SyncBN"}]


@pytest.mark.parametrize("norm_cfg", NORMS, ids=lambda cfg: str(cfg and cfg["type"]))
@pytest.mark.parametrize(
    "network", [TINY, {"type": "TimmBackbone", "model_name": "test_resnet"}], ids=lambda n: n["type"]
)
def test_norm_eval_is_of_every_batch_norm(network: dict[str, Any], norm_cfg: dict[str, Any] | None) -> None:
    """Of whatever class: synchronised ones are no ``nn.BatchNorm2d``."""
    for fixed in (True, False):
        backbone = build(**network, norm_eval=fixed, norm_cfg=norm_cfg)
        norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        for _ in range(2):
            backbone.train()
            assert {m.training for m in norms} == {not fixed}
            backbone.eval()
            assert not any(m.training for m in norms)


def test_norm_cfg() -> None:
    synchronised = build(**TINY, norm_cfg={"type": "SyncBN"})
    kinds = {type(m) for m in synchronised.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {nn.SyncBatchNorm}
    groups = build(**TINY, norm_cfg={"type": "GN", "num_groups": 8})
    assert not any(isinstance(m, nn.BatchNorm2d) for m in groups.modules())
    stored = build(**TINY, norm_cfg={"type": "GN", "num_groups": 8}, mode="store")
    a, b = gradients(groups, images()), gradients(stored, images())
    assert all(torch.equal(a[name], b[name]) for name in a)
    fixed = build(type="TimmBackbone", model_name="efficientnet_b0", norm_cfg={"type": "BN", "requires_grad": False})
    assert {p.requires_grad for n, p in fixed.named_parameters() if ".bn" in n} == {False}


def test_synchronised_norms_in_eval_mode_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[Any, ...]] = []
    monkeypatch.setattr("revnets.mm.networks.backbone.print_log", lambda *words: said.append(words))
    build(**TINY, norm_cfg={"type": "SyncBN"}, norm_eval=True)
    assert "norm_eval=True" in said[0][0]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_modes() -> None:
    assert build(**TINY).mode == "reversible"
    assert build(**TINY, with_cp=True).mode == "reversible"
    assert build(**TINY, with_cp=True, mode="store").mode == "checkpoint"
    assert build(type="TimmBackbone", model_name="resnet18", with_cp=True).mode == "checkpoint"
    plain, cheap = (build(type="TimmBackbone", model_name="resnet18", with_cp=c) for c in (False, True))

    def peak(model: nn.Module) -> int:
        return predict_training_step(model, images(128), lambda ys: sum(y.square().mean() for y in ys)).step_bytes

    assert peak(cheap) < peak(plain)


@pytest.mark.parametrize("network", [TINY, {"type": "TimmBackbone", "model_name": "resnet18"}])
def test_layers(network: dict[str, Any]) -> None:
    backbone = build(**network, layers={"type": "sparse_doped", "sparsity": 0.75}, out_indices=(1, 2))
    masks = [m.mask for m in backbone.modules() if isinstance(getattr(m, "mask", None), torch.Tensor)]
    assert masks
    assert [y.shape[1] for y in backbone(images())] == backbone.out_channels
    for name, grad in gradients(backbone, images()).items():
        assert grad is not None, name


# --- weights ---------------------------------------------------------------------------------------------------------


def save(state: Any, path: Path) -> str:
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("kind", ["state dict", "classification", "averaged", "detector", "safetensors"])
def test_pretrained(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = timm.create_model("test_revbifpn", num_classes=7)
    state, prefix, path = source.state_dict(), None, tmp_path / "weights.pth"
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    if kind == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif kind == "detector":
        trained = RevBiFPN("test")
        trained.net.model.load_state_dict(state, strict=False)
        prefix = "backbone."
        save({"state_dict": {f"backbone.{key}": value for key, value in trained.state_dict().items()}}, path)
    else:
        content = {"state dict": state, "classification": {"state_dict": state, "epoch": 3}}
        save(content.get(kind, {"state_dict": other, "state_dict_ema": state}), path)
    backbone = build(**TINY, init_cfg={"type": "Pretrained", "checkpoint": str(path), "prefix": prefix})
    backbone.init_weights()
    own = backbone.net.model.state_dict()
    assert own
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_pretrained_network_of_timm(tmp_path: Path) -> None:
    source = timm.create_model("resnet18", num_classes=3)
    path = save(source.state_dict(), tmp_path / "r18.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": path}
    backbone = build(type="TimmBackbone", model_name="resnet18", init_cfg=init_cfg)
    backbone.init_weights()
    assert torch.equal(backbone.net.layer2[1].conv2.weight, source.layer2[1].conv2.weight)


def test_pretrained_by_timms_name(monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model("test_revbifpn")
    backbone = build(**TINY, init_cfg={"type": "Pretrained", "checkpoint": "timm://test_revbifpn"})
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: source if pretrained else None)
    backbone.init_weights()
    assert torch.equal(backbone.net.model.neck.blocks[0].conv_pwl.weight, source.neck.blocks[0].conv_pwl.weight)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"arch": "s9"}, "unknown arch 's9': expected one of s0, s1"),
        ({"out_indices": (0, 4)}, "has feature levels 0 to 3"),
        ({"frozen_stages": 5}, "frozen_stages=5: test_revbifpn has a stem .0. and stages 1 to 4"),
        ({"frozen_stages": -2}, "frozen_stages=-2"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"norm_cfg": {"num_groups": 2}}, "expected a dict with a type"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RevBiFPN(**{"arch": "test", **kwargs})


def test_wrong_networks() -> None:
    with pytest.raises(ValueError, match="unknown model 'resnet17'"):
        TimmBackbone("resnet17")
    with pytest.raises(ValueError, match="hrnet_w18_small has no checkpointing"):
        TimmBackbone("hrnet_w18_small", with_cp=True)
    with pytest.raises(ValueError, match="resnet18 is not reversible"):
        TimmBackbone("resnet18", mode="reversible")


def test_wrong_weights(tmp_path: Path) -> None:
    def load(backbone: dict[str, Any], path: Path | str, **more: Any) -> None:
        build(**backbone, init_cfg={"type": "Pretrained", "checkpoint": str(path), **more}).init_weights()

    other = save(timm.create_model("test_revbifpn", width=2 / 3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"not of this RevBiFPN variant: .* has shape"):
        load(TINY, other)
    with pytest.raises(ValueError, match=r"is not of resnet18: .* tensors do not fit"):
        load({"type": "TimmBackbone", "model_name": "resnet18"}, other)
    with pytest.raises(ValueError, match=r"no key that starts with 'neck\.x\.'"):
        load(TINY, other, prefix="neck.x")
    with pytest.raises(FileNotFoundError, match="is not there"):
        load(TINY, tmp_path / "none.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="truncated"):
        load(TINY, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds more than weights"):
        load(TINY, save({"state_dict": {"x": Path("y")}}, tmp_path / "pickle.pth"))
    with pytest.raises(ValueError, match="timm knows no model 'nothing'"):
        load(TINY, "timm://nothing")
    with pytest.raises(ValueError, match="initialises itself"):
        build(**TINY, init_cfg={"type": "Kaiming", "layer": "Conv2d"}).init_weights()


def test_names_are_registered() -> None:
    from mmdet.registry import MODELS

    assert all(MODELS.get(name) is getattr(revnets.mm, name) for name in ("RevBiFPN", "TimmBackbone", "RevBiFPNNeck"))


LEAN = [
    {"type": "TimmBackbone", "model_name": "test_resnet", "out_indices": (1, 2), "frozen_stages": 1},
    {"type": "ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8, "frozen_stages": 1, "norm_eval": True},
]


@pytest.mark.parametrize("config", LEAN, ids=["timm", "mmdet"])
def test_lean(config: dict[str, Any]) -> None:
    plain = build(**config)
    if config["type"] == "TimmBackbone":
        lean = build(**config, layers="lean")
        lean.load_state_dict(plain.state_dict())
    else:
        lean = revnets.convert(copy.deepcopy(plain), "lean", input_size=(3, 64, 64)).model
    plain.train()  # which returns nothing in MMDetection
    lean.train()
    assert any(is_lean(module) for module in lean.modules())
    expected = gradients(plain, images(64))
    for name, grad in gradients(lean, images(64)).items():
        assert (grad is None and expected[name] is None) or torch.equal(grad, expected[name]), name
