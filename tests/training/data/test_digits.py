"""Folders that follow from their settings are made once, and nobody else's files are touched."""

from pathlib import Path

import pytest

from revnets.training.data.digits import make_once
from revnets.training.errors import UserError


def test_a_folder_is_made_once_for_its_settings(tmp_path: Path) -> None:
    made = []

    def fill(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text("1")

    root = tmp_path / "new" / "digits"
    for _ in range(2):
        assert make_once(root, "digits", "digits.json", {"size": 8}, fill) == root
    assert len(made) == 1
    assert sorted(path.name for path in root.iterdir()) == ["a", "digits.json"]
    with pytest.raises(UserError, match=r"^--data-dir: '.*digits' holds other files than digits with {'size': 9}; del"):
        make_once(root, "digits", "digits.json", {"size": 9}, fill)


@pytest.mark.parametrize("content", ["", "{", '{"size": 9}'])
def test_a_folder_of_others_stays(content: str, tmp_path: Path) -> None:
    (tmp_path / "digits.json").write_text(content)
    with pytest.raises(UserError, match="holds other files"):
        make_once(tmp_path, "digits", "digits.json", {"size": 8}, Path.unlink)
    assert [path.name for path in tmp_path.iterdir()] == ["digits.json"]


def test_a_folder_that_cannot_be_filled_is_not_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise UserError("no scans")

    with pytest.raises(UserError, match="no scans"):
        make_once(tmp_path / "digits", "digits", "digits.json", {}, fail)
    assert not list(tmp_path.iterdir())
