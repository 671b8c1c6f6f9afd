"""A tiny detector on a few scenes, and short runs of it."""

from pathlib import Path

import pytest

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("mmdet", reason=REASON)
pytest.importorskip("sklearn", reason="scikit-learn brings the digits: pip install 'revnets[quickstart]'")

from detection.digits import SceneOptions, make_scenes  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TINY = """
_base_ = "{root}/configs/detection/digits/{name}.py"
data_root = "{data}"
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip")),
]
loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, dataset=dict(data_root=data_root, pipeline=pipeline))
val_dataloader = dict(**loader, dataset=dict(data_root=data_root))
test_dataloader = dict(**loader, dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + "/val.json")
test_evaluator = dict(ann_file=data_root + "/test.json")
model = dict(backbone=dict(arch="test"), neck=dict(in_channels=[16, 16, 32, 96]))
train_cfg = dict(max_epochs=2, val_interval=2)
"""


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8, 2 and 2 scenes."""
    return make_scenes(tmp_path_factory.mktemp("scenes") / "digits", SceneOptions(train=8, val=2, test=2))


@pytest.fixture(scope="session")
def tiny(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration for them."""
    return tiny_config(tmp_path_factory.mktemp("config"), scenes)


def tiny_config(folder: Path, data: Path, name: str = "faster-rcnn_revbifpn-s0_digits") -> Path:
    """One of our configurations on a tiny backbone, with small images that are flipped at random."""
    path = folder / "tiny.py"
    path.write_text(TINY.format(root=ROOT, data=data, name=name))
    return path
