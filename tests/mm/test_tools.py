"""MMDetection's own tools on our models, run as their users run them: by path, without a launcher of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

import mmcv  # noqa: E402
import mmdet  # noqa: E402

from detection.digits import SceneOptions, make_scenes  # noqa: E402
from revnets.mm.operators import plug_in  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(mmdet.__file__).parent / ".mim" / "tools"
CONFIG = f"""
_base_ = "{ROOT}/configs/detection/digits/gfl_revbifpn-s0_digits.py"
loader = dict(batch_size=4, num_workers=0, persistent_workers=False)
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
model = dict(backbone=dict(arch="test"), neck=dict(in_channels=[16, 16, 32, 96]), test_cfg=dict(score_thr=0.0))
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(interval=1))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, scenes, and an mmcv that is the installed one and has our file in its folder."""
    made = tmp_path_factory.mktemp("tools")
    make_scenes(made / "scenes", SceneOptions(train=8, val=4, test=4, size=80))
    (made / "config.py").write_text(CONFIG)
    links = made / "site" / "mmcv"
    links.mkdir(parents=True)
    for path in Path(mmcv.__file__).parent.iterdir():
        if path.name != "__pycache__" and not plug_in.is_ours(str(path)):
            (links / path.name).symlink_to(path)
    run(made, "-m", "revnets.mm", "--install")
    run(made, TOOLS / "train.py", "config.py", "--work-dir", "run")
    return made


def run(folder: Path, *words: str | Path) -> str:
    paths = os.pathsep.join([str(folder / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "DIGITS_ROOT": "scenes", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("LOCAL_RANK", None)
    line = [sys.executable, "-W", "ignore", *map(str, words)]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_train_and_test(folder: Path) -> None:
    assert (folder / "run" / "epoch_1.pth").is_file()
    assert "coco/bbox_mAP" in run(folder, TOOLS / "test.py", "config.py", "run/epoch_1.pth", "--work-dir", "tested")


def test_get_flops(folder: Path) -> None:
    said = run(folder, TOOLS / "analysis_tools" / "get_flops.py", "config.py", "--num-images", "1")
    assert re.search(r"Flops: [0-9.]+[MG]", said)
    assert "Input shape: (128, 128)" in said


def test_browse_dataset(folder: Path) -> None:
    run(folder, TOOLS / "analysis_tools" / "browse_dataset.py", "config.py", "--not-show", "--output-dir", "shown")
    assert len(list((folder / "shown").glob("*.png"))) == 8


def test_analyze_logs(folder: Path) -> None:
    (log,) = (folder / "run").glob("*/vis_data/*[0-9].json")
    assert "average iter time" in run(folder, TOOLS / "analysis_tools" / "analyze_logs.py", "cal_train_time", log)
