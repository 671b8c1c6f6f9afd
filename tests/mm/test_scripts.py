"""MMDetection's own scripts under `python -m revnets.mm`: our COCO data set, and one run per work folder."""

import json
import sys
from pathlib import Path

import pytest

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from mmengine.hooks import CheckpointHook  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from PIL import Image  # noqa: E402

from revnets.mm.__main__ import main  # noqa: E402
from revnets.training import lock  # noqa: E402
from revnets.training.lock import FolderLock  # noqa: E402
from tests.mm.hooks.test_resume import Toy  # noqa: E402

SCRIPT = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner

data = dict(type="CocoDataset", ann_file="boxes.json", data_root=sys.argv[1], pipeline=[])
data.update(metainfo=dict(classes=("a",)), data_prefix=dict(img="."))
loader = dict(batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler"), dataset=data)
runner = Runner.from_cfg(
    Config(
        dict(
            model=dict(type="ToyOfScripts"),
            work_dir=sys.argv[1] + "/run",
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
            default_scope="mmdet",
            log_level="ERROR",
            experiment_name="scripts",
        )
    )
)
loop = runner.build_train_loop(runner._train_loop)
print("images:", *[(type(d).__name__, len(d), d[0]["width"]) for d in [loop.dataloader.dataset]])
if len(sys.argv) > 2:
    runner.train()
"""


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A script that trains, and its arguments; what the command changes of MMEngine's is put back."""
    for name in ("before_train", "before_run", "after_run"):
        monkeypatch.setattr(CheckpointHook, name, getattr(CheckpointHook, name))
    monkeypatch.setattr(Runner, "from_cfg", Runner.__dict__["from_cfg"])
    monkeypatch.setattr(lock, "_PAUSE", 0.001)
    monkeypatch.setattr(sys, "path", list(sys.path))
    MODELS.register_module("ToyOfScripts", module=Toy, force=True)
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": -1, "height": -1}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    (tmp_path / "train.py").write_text(SCRIPT)
    return ["revnets.mm", str(tmp_path / "train.py"), str(tmp_path)]


def test_images_without_a_size_are_seen(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", line)
    assert main() == 0
    assert "images: ('CheckedCocoDataset', 1, 8)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test.py", "./test.py", "own.py"])
def test_names_are_mmdetections_before_they_are_files_of_this_folder(
    name: str, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies about in the folder, such as our own detection/test.py, is not run in its place."""
    monkeypatch.chdir(tmp_path)
    for file in ("test.py", "own.py"):
        (tmp_path / file).write_text("print('of this folder')")
    monkeypatch.setattr(sys, "argv", ["revnets.mm", name, "--help"])
    if name == "test.py":
        with pytest.raises(SystemExit):
            main()
        assert "MMDet test (and eval) a model" in capsys.readouterr().out
    else:
        assert main() == 0
        assert capsys.readouterr().out == "of this folder\n"


@pytest.mark.parametrize("content", [None, "model = dict("])
def test_files_that_a_script_cannot_read(
    content: str | None,
    line: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "config.py").write_text(content)
    monkeypatch.setattr(sys, "argv", ["revnets.mm", "test.py", "config.py", "none.pth"])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "test.py: " in said
    assert said.endswith("; correct its arguments.\n")
    assert "Traceback" not in said


def test_a_work_folder_in_use_is_refused(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*line, "train"])
    monkeypatch.setattr("revnets.mm.hooks.checkpoint.held_here", lambda folder: None)  # as if of another process
    (tmp_path / "run").mkdir()
    with FolderLock(tmp_path / "run"):
        assert main() == 2
    assert f"error: '{tmp_path / 'run'}' is in use by process" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))
