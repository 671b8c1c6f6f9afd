"""A checkpoint of before the modules moved is tested and gone on from, with the weights of that time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detection import test as testing
from detection import train as training

from ..golden.older import assert_sizes, expected, unpacked
from .conftest import tiny_config

MODEL = """
model = dict(
    backbone=dict(
        _delete_=True, type="ResNet", depth=18, base_channels=4, num_stages=2, strides=(1, 2), dilations=(1, 1),
        out_indices=(0, 1), norm_cfg=dict(type="BN"), style="pytorch",
    ),
    neck=dict(_delete_=True, type="FPN", in_channels=[4, 8], out_channels=4, num_outs=2),
    bbox_head=dict(
        _delete_=True, type="RetinaHead", num_classes=10, in_channels=4, stacked_convs=1, feat_channels=4,
        anchor_generator=dict(
            type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[4, 8]
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
    ),
)
train_cfg = dict(max_epochs=2, val_interval=1)
"""


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> Path:
    path = tiny_config(tmp_path, scenes, "retinanet_revbifpn-s0_digits")
    text = path.read_text()
    path.write_text(text[: text.index("model = dict(")] + MODEL)
    return path


def test_a_run_goes_on(config: Path, tmp_path: Path) -> None:
    interim, run = unpacked("interim.pth", tmp_path / "interim.pth"), tmp_path / "run"
    assert (
        training.main([str(config), "--work-dir", str(run), "--draw", "0", "--seed", "1", "--resume", str(interim)])
        == 0
    )
    state = torch.load(run / "epoch_2.pth", weights_only=False)
    assert state["meta"]["iter"] == 8
    assert_sizes(state["state_dict"], expected()["detector"])


def test_weights_are_tested(config: Path, tmp_path: Path) -> None:
    interim = unpacked("interim.pth", tmp_path / "interim.pth")
    assert testing.main([str(config), str(interim), "--work-dir", str(tmp_path / "run"), "--draw", "0"]) == 0
