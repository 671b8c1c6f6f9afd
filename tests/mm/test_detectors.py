"""``revnets profile`` on MMDetection configs: backbone, neck and heads apart, predicted and measured."""

from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")

from typer.testing import CliRunner

from revnets.cli import app
from revnets.mm.detectors import PARTS, parse_config
from revnets.profiling.fake import ProfileError
from revnets.profiling.profile import predict, profile
from revnets.profiling.target import Setting

SETTING = Setting(optimizer=None)
STOCK = {
    "faster-rcnn": "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "retinanet": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    """RetinaNet with a tiny reversible backbone and a reversible neck."""
    path = tmp_path / "tiny.py"
    path.write_text(
        f"_base_ = '{STOCK['retinanet']}'\n"
        "custom_imports = dict(imports=['revnets.mm'], allow_failed_imports=False)\n"
        "model = dict(\n"
        "    backbone=dict(_delete_=True, type='RevBiFPN', arch='test'),\n"
        "    neck=dict(_delete_=True, type='RevBiFPNNeck', in_channels=[16, 16, 32, 96], out_channels=16,\n"
        "              num_silos=2, num_outs=5),\n"
        "    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3))\n"
    )
    return str(path)


def test_parts_and_modes(config: str) -> None:
    targets = parse_config(f"{config}@64x96:2", SETTING)
    assert [(t.part, t.mode) for t in targets] == [
        (part, mode) for mode in ("reversible", "store", "checkpoint") for part in PARTS
    ]
    assert str(targets[0]) == "tiny backbone @64x96 batch 2"
    found = {(t.part, t.mode): predict(t, SETTING) for t in targets if t.mode != "checkpoint"}
    macs = [found[part, "reversible"].macs for part in PARTS]
    assert 0 < macs[0] < macs[1] < macs[2]
    for part in PARTS:
        assert found[part, "reversible"].step_bytes < found[part, "store"].step_bytes


def test_predicted_equals_measured_up_to_the_neck(config: str) -> None:
    rows = [profile(t, SETTING) for t in parse_config(f"{config}@64x96:2", SETTING) if t.mode == "reversible"]
    for row in rows:
        assert row.error is not None
        if row.target.part != "detector":  # whose anchors count for more than its maps at this size
            assert abs(row.error) < 0.0065, str(row.target)


def test_deeper_necks(config: str) -> None:
    (target,) = [t for t in parse_config(f"{config}@256:4", SETTING) if t.part == PARTS[1] and t.mode == "reversible"]
    _, shallow, _, deep = (predict(t, SETTING) for t in target.deeper())
    activations = [p.step_bytes - p.gradient_bytes for p in (shallow, deep)]
    assert activations[1] <= 1.01 * activations[0]
    assert deep.parameters > shallow.parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_stock_configs(name: str) -> None:
    targets = [t for t in parse_config(f"{STOCK[name]}@128x160:1", SETTING) if t.mode == "store"]
    for target in targets:
        row = profile(target, SETTING)
        assert row.error is not None
        assert abs(row.error) < 0.05, f"{target}: {row.error}"


def test_on_the_command_line(config: str, tmp_path: Path) -> None:
    arguments = ["profile", f"{config}@64", "--mode", "reversible", "--no-measure", "--optimizer", "none"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "out").glob("timeline_*.png"))) == 3
    lines = (tmp_path / "out" / "profile.csv").read_text().splitlines()
    assert "part" in lines[0]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none.py", "config 'none.py' is not there"),
        ("mmdet::none.py", "is not there"),
        ("a.py@0", "expected CONFIG.py@HEIGHTxWIDTH:BATCH"),
        ("{folder}/syntax.py", "cannot be read"),
        ("{folder}/type.py", "cannot be built: .*Backwards"),
        ("{folder}/empty.py", "has no model"),
    ],
)
def test_mistakes(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "syntax.py").write_text("model = dict(")
    (tmp_path / "type.py").write_text("model = dict(type='Backwards')\n")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ProfileError, match=words):
        parse_config(text.format(folder=tmp_path), SETTING)


def test_heads_that_cannot_be_predicted() -> None:
    targets = parse_config("mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py@64", SETTING)
    (detector,) = [t for t in targets if t.part == "detector" and t.mode == "store"]
    with pytest.raises(ProfileError, match=r"heads of CascadeRCNN cannot be predicted.*--part backbone,neck"):
        predict(detector, SETTING)
