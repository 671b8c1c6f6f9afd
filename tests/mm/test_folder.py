"""Work folders of MMEngine's runner: one run at a time, and names out of checkpoints lead to no other folder."""

from pathlib import Path
from typing import Any

import pytest

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from detection import checkpoints  # noqa: E402
from revnets.mm.hooks.checkpoint import own_names  # noqa: E402
from revnets.training import lock  # noqa: E402
from revnets.training.lock import FolderLock, InUse, held_here  # noqa: E402
from tests.mm.hooks import test_resume as toy  # noqa: E402


def test_names_in_the_hub_are_of_this_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for path in (tmp_path / "precious.pth", folder / "best_coco_bbox_mAP_epoch_1.pth", folder / "epoch_2.pth"):
        path.touch()
    known: dict[str, Any] = {
        "best_ckpt": str(tmp_path / "precious.pth"),
        "best_ckpt_coco/bbox_mAP": "/moved/best_coco_bbox_mAP_epoch_1.pth",
        "best_ckpt_other": ["epoch_2.pth"],
        "last_ckpt": "../run/epoch_2.pth",
        "keep_ckpt_ids": ["../../precious"],
        "best_score": 0.5,
    }
    own_names(known, folder)
    assert known == {
        "best_ckpt_coco/bbox_mAP": str(folder / "best_coco_bbox_mAP_epoch_1.pth"),
        "last_ckpt": str(folder / "epoch_2.pth"),
        "best_score": 0.5,
    }


@pytest.mark.parametrize("steps", [(1, 2), [1, 2]])
def test_numbers_of_epochs_are_kept(steps: Any, tmp_path: Path) -> None:
    known = {"keep_ckpt_ids": steps}
    own_names(known, tmp_path)
    assert known == {"keep_ckpt_ids": [1, 2]}


def test_a_resumed_run_deletes_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best checkpoint that a file names is removed once a better one is there."""
    precious = tmp_path / "precious.pth"
    precious.write_text("x")
    folder = tmp_path / "run"
    toy.run(folder, [], stop=3, save_best="score", rule="greater")
    plain = toy.Runner.load_or_resume

    def planted(runner: Any) -> None:
        plain(runner)
        runner.message_hub.runtime_info.update(best_ckpt=str(precious), keep_ckpt_ids=["../../precious"])

    monkeypatch.setattr(toy.Runner, "load_or_resume", planted)
    toy.run(folder, [], save_best="score", rule="greater", max_keep_ckpts=1)
    assert precious.exists()
    assert (folder / "best_score_epoch_2.pth").exists()


def test_a_folder_in_use_is_refused_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PAUSE", 0.001)
    with FolderLock(tmp_path), monkeypatch.context() as patch:
        patch.setattr("revnets.mm.hooks.checkpoint.held_here", lambda folder: None)  # as if of another process
        with pytest.raises(InUse, match="is in use by process"):
            toy.run(tmp_path, [])
        assert not list(tmp_path.glob("*.pth"))
    toy.run(tmp_path, [], stop=2)  # fails with the lock in hand
    assert held_here(tmp_path) is not None
    toy.run(tmp_path, [])
    assert held_here(tmp_path) is None
    assert not (tmp_path / lock.NAME).exists()


def test_the_last_checkpoint_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.pth").touch()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "epoch_1.pth").touch()
    for text, found in {
        str(tmp_path / "elsewhere.pth"): None,
        "../elsewhere.pth": None,
        "/moved/away/epoch_1.pth\n": folder / "epoch_1.pth",
        "": None,
    }.items():
        (folder / checkpoints.LAST).write_text(text)
        assert checkpoints.newest(folder) == found
    (folder / checkpoints.LAST).write_bytes(b"\xff\xfe")
    assert checkpoints.newest(folder) is None
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "epoch_9.pth").touch()
    (folder / checkpoints.LAST).write_text(str(tmp_path / "saved" / "epoch_9.pth"))
    assert checkpoints.newest(folder, tmp_path / "saved") == tmp_path / "saved" / "epoch_9.pth"
