"""Configurations by name: ours where no file is, never instead of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from classification.options import CONFIGS as RECIPES
from revnets.training.errors import UserError
from revnets.training.recipes import find


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    for name in ("plain.yaml", "a/one.yaml", "a/two.yaml", "b/two.yaml", "a/v1.5.yaml", "_base_/part.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("plain", "plain.yaml"),
        ("plain.yaml", "plain.yaml"),
        ("one", "a/one.yaml"),
        ("a/one", "a/one.yaml"),
        ("b/two.yaml", "b/two.yaml"),
        ("v1.5", "a/v1.5.yaml"),
        ("configs/ours/a/one.yaml", "a/one.yaml"),
    ],
)
def test_names(text: str, file: str, ours: Path) -> None:
    assert find(text, ours, ".yaml", "--config") == ours / file


def test_a_file_wins_over_a_name(ours: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.yaml").touch()
    assert find("plain.yaml", ours, ".yaml", "--config") == Path("plain.yaml")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert find("dangling", ours, ".yaml", "--config") == Path("dangling")


def test_a_folder_does_not_win_over_a_name(ours: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "other"):
        (tmp_path / name).mkdir()
    assert find("plain", ours, ".yaml", "--config") == ours / "plain.yaml"
    assert find("other", ours, ".yaml", "--config") == Path("other")  # whoever reads it says what is wrong


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("two", r"several files: a/two, b/two; give one of these"),
        ("plian", r"no file 'plian' \(did you mean 'plain'\?\)"),
        ("part", r"no file 'part'"),
        ("_base_/part", r"no file"),
        ("../ours/plain", r"no file"),
        ("*", r"no file"),
        ("", r"no file"),
        ("a\0b", r"no file"),
        ("x" * 5000, r"no file"),
    ],
)
def test_what_is_neither(text: str, words: str, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^--config: .*{words}"):
        find(text, ours, ".yaml", "--config")


def test_every_recipe_has_a_name() -> None:
    for file in RECIPES.rglob("*.yaml"):
        name = file.relative_to(RECIPES).with_suffix("").as_posix()
        assert find(name, RECIPES, ".yaml", "--config") == file
