"""Every configuration: short, runnable as its first line says, built by `type=` strings, with what it promises."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.config import CONFIGS, read

from . import families

FILES = sorted(CONFIGS.glob("[!_]*/*.py"))
BASES = sorted(CONFIGS.glob("_base_/*/*.py"))
SIZES = [f"s{n}" for n in range(7)]
QUICK = [f for f in FILES if "coco" not in f.stem or "-s0_" in f.stem]  # reading all of them takes a while
SIZED = [f for f in FILES if "_revbifpn-s" in f.stem]
KINDS = {
    "faster-rcnn": "FasterRCNN",
    "mask-rcnn": "MaskRCNN",
    "retinanet": "RetinaNet",
    "gfl": "GFL",
    "rtmdet": "RTMDet",
    "deformable-detr": "DeformableDETR",
}
FOREIGN = {"rtmdet": ("AdamW", 0.004, 300), "deformable-detr": ("AdamW", 0.0002, 50)}
"""Recipes that are MMDetection's own but for the backbone and the data set's checks."""
EACH = [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in SIZED]


@functools.cache
def load(path: Path) -> Any:
    return read(str(path))


BUILT = [each for each in EACH if "_1x_" in each.values[0].stem or "coco" not in each.values[0].stem]


def relative(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_the_whole_matrix_is_there() -> None:
    names = {path.stem for path in FILES}
    for kind, sizes in {"faster-rcnn": SIZES, "mask-rcnn": SIZES, "retinanet": SIZES[:3]}.items():
        for size in sizes:
            for schedule in ("1x", "2x", "amp-1x"):
                assert f"{kind}_revbifpn-{size}_{schedule}_coco" in names
        assert f"{kind}_revbifpn-s0_digits" in names
    assert {"faster-rcnn_revbifpn-s0_bccd", "retinanet_revbifpn-s0_bccd"} <= names


@pytest.mark.parametrize("path", FILES + BASES, ids=relative)
def test_is_short_and_opens_with_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 30
    assert lines[0].startswith("# ")
    if path in FILES:
        assert lines[0].endswith(f"python detection/train.py configs/detection/{relative(path)}")


@pytest.mark.parametrize("path", EACH, ids=relative)
def test_says_what_its_name_says(path: Path) -> None:
    cfg = load(path)
    kind, size, what = path.stem.split("_", 1)[0], path.stem.split("_revbifpn-s")[1][0], path.stem.split("_")[-1]
    assert cfg.custom_imports == {"imports": ["revnets.mm"], "allow_failed_imports": False}
    assert cfg.model.type == KINDS[kind]
    assert cfg.model.backbone.type == "RevBiFPN"
    assert cfg.model.backbone.arch == f"s{size}"
    if what == "coco" and kind not in FOREIGN:
        assert cfg.train_cfg.max_epochs == (24 if "_2x_" in path.stem else 12)
        assert cfg.optim_wrapper.type == ("Bf16OptimWrapper" if "_amp-" in path.stem else "OptimWrapper")
        optimizer = cfg.optim_wrapper.optimizer
        assert (optimizer.type, optimizer.lr) == ("SGD", 0.02 if kind.endswith("rcnn") else 0.01)
        assert cfg.auto_scale_lr.base_batch_size == 16


@pytest.mark.parametrize("kind", FOREIGN)
def test_recipes_of_others_stay_theirs(kind: str) -> None:
    (path,) = CONFIGS.glob(f"coco/{kind}_revbifpn-*.py")
    cfg = load(path)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, cfg.train_cfg.max_epochs) == FOREIGN[kind]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert (loader.dataset.type, loader.dataset.data_root) == ("CheckedCocoDataset", cfg.data_root)
    assert cfg.test_evaluator.ann_file == f"{cfg.data_root}/annotations/instances_val2017.json"
    assert build(cfg.model).backbone.out_channels == list(cfg.model.neck.in_channels)


def build(part: Any) -> Any:
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmdet"), torch.device("meta"):
        return MODELS.build(part)


@functools.cache
def channels(arch: str) -> list[int]:
    backbone = build({"type": "RevBiFPN", "arch": arch})
    assert backbone.strides == [4, 8, 16, 32]
    return backbone.out_channels


@pytest.mark.parametrize("path", EACH, ids=relative)
def test_neck_takes_what_the_backbone_gives(path: Path) -> None:
    model = load(path).model
    gives = channels(model.backbone.arch)
    assert list(model.neck.in_channels) == [gives[index] for index in model.backbone.get("out_indices", range(4))]


@pytest.mark.parametrize("path", BUILT, ids=relative)
def test_builds_by_its_strings(path: Path) -> None:
    model = build(load(path).model)
    assert model.backbone.out_channels == list(model.neck.in_channels)


@pytest.mark.parametrize(
    "name", ["digits/faster-rcnn", "digits/mask-rcnn", "digits/retinanet", "digits/gfl", "coco/retinanet"]
)
def test_every_parameter_learns(name: str) -> None:
    """Data-parallel training waits for every gradient."""
    data, kind = name.split("/")
    model = families.build(f"{kind}_revbifpn-s0_{'1x_coco' if data == 'coco' else 'digits'}")
    families.losses(model).backward()
    assert [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None] == []


def test_revsilos_as_the_neck_of_a_resnet() -> None:
    model = build(load(CONFIGS / "coco" / "faster-rcnn_r50-revbifpn-neck_1x_coco.py").model)
    assert len(model.neck.silos.ops) == 3
    outs = model.eval().extract_feat(torch.zeros(1, 3, 64, 64, device="meta"))
    assert [tuple(y.shape[1:]) for y in outs] == [(256, s, s) for s in (16, 8, 4, 2, 1)]


def test_sparse_layers_everywhere() -> None:
    cfg = load(CONFIGS / "digits" / "retinanet_revbifpn-s0_doped_digits.py").copy()
    cfg.model.backbone.arch = "test"
    cfg.model.neck.in_channels = [16, 16, 32, 96]
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
    for part in (model.backbone, model.neck, model.bbox_head):
        assert any(isinstance(getattr(m, "mask", None), torch.Tensor) for m in part.modules()), type(part)


@pytest.mark.parametrize(
    ("name", "variable"),
    [("coco/mask-rcnn_revbifpn-s0_1x_coco", "COCO_ROOT"), ("bccd/faster-rcnn_revbifpn-s0_bccd", "BCCD_ROOT"),
     ("digits/mask-rcnn_revbifpn-s0_digits", "DIGITS_ROOT")],
)  # fmt: skip
def test_data_can_be_elsewhere(name: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from detection.config import load as load_all
    from detection.config import parse, parser

    path = str(CONFIGS / f"{name}.py")
    moved = load_all(parse(parser("x", ""), [path, "--cfg-options", "data_root=/else/where"]))
    monkeypatch.setenv(variable, "/else/where")
    for cfg in (moved, read(path)):
        for split in ("train", "val", "test"):
            assert cfg[f"{split}_dataloader"].dataset.data_root == "/else/where"
        assert cfg.val_evaluator.ann_file.startswith("/else/where/")
        assert cfg.test_evaluator.ann_file.startswith("/else/where/")
