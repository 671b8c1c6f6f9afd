"""Splits that are there are found, others are not made up; folders hold what they seem to hold."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from revnets.training.data.splits import check_split, find_split, overlap, read_class_map, split_or_root


def images(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    return folder


@pytest.mark.parametrize(("there", "asked"), [("val", "validation"), ("valid", "eval"), ("training", "train")])
def test_other_words_of_timm(there: str, asked: str, tmp_path: Path) -> None:
    images(tmp_path, f"{there}/a/1.png")
    assert find_split(tmp_path, asked) == tmp_path / there


def test_the_exact_name_comes_first(tmp_path: Path) -> None:
    images(tmp_path, "val/a/1.png", "validation/a/1.png")
    assert find_split(tmp_path, "validation") == tmp_path / "validation"


@pytest.mark.parametrize("split", ["trian", "test", "validation", "train[:50%]", "", "train.tar", "a.txt", "train/b"])
def test_what_is_not_there_is_not_made_up(split: str, tmp_path: Path) -> None:
    images(tmp_path, "train/a/1.png")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"there is no '|no split is named|neither a folder nor"):
        find_split(tmp_path, split)


def test_the_folder_itself_has_to_be_asked_for(tmp_path: Path) -> None:
    images(tmp_path, "a/1.png")
    assert find_split(tmp_path, ".").samefile(tmp_path)
    assert split_or_root(tmp_path, "train") == tmp_path  # class folders and no splits
    images(tmp_path, "val/a/1.png")
    with pytest.raises(ValueError, match="there is no 'train'"):
        split_or_root(tmp_path, "train")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "holds no images"),
    "empty class folders": (lambda path: (path / "a").mkdir(), "holds no images"),
    "one of them empty": (lambda path: (images(path, "a/1.png"), (path / "b").mkdir()), "class folder 'b'"),
    "one of them with other files": (lambda path: images(path, "a/1.png", "b/1.webp"), "class folder 'b'"),
    "one within empty": (lambda path: (images(path, "a/b/1.png"), (path / "a" / "c").mkdir()), "class folder 'a/c'"),
    "images without class": (lambda path: images(path, "a/1.png", "1.png"), "1 images lie in"),
    "archives": (lambda path: tarfile.open(path / "a.tar", "w").close(), "'a.tar' in it is none"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_are_not_what_they_seem(what: str, tmp_path: Path) -> None:
    make, words = FOLDERS[what]
    make(tmp_path)
    with pytest.raises(ValueError, match=words):
        check_split(tmp_path)


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    images(tmp_path, "a/1.png", "a/2.JPG", "a/3.bmp", "a/4.bmp", "a/5.webp", ".hidden/notes.png")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    tarfile.open(tmp_path / "old.tar", "w").close()
    said = check_split(tmp_path)
    words = ("2 files of kind .bmp", "1 files of kind .webp", "1 .tar files")
    assert [word in sentence for word, sentence in zip(words, said, strict=True)] == [True] * 3


def test_splits_that_share_images(tmp_path: Path) -> None:
    images(tmp_path, "train/a/1.png", "val/a/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "train")
    assert overlap(tmp_path / "train", tmp_path / "val") == ""
    assert "the same" in overlap(tmp_path / "train", tmp_path / "link")
    assert "lies in" in overlap(tmp_path, tmp_path / "val")
    assert "lies in" in overlap(tmp_path / "link" / "a", tmp_path / "train")


@pytest.mark.parametrize(
    ("text", "words"), [("", "empty"), ("a\nb\na\n", "'a' is empty or there twice"), ("a\n\nb\n", "'' is empty")]
)
def test_class_maps(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_class_map("names.txt", tmp_path)
    (tmp_path / "names.txt").write_text("b\n a \n")
    assert read_class_map(tmp_path / "names.txt") == {"b": 0, "a": 1}
    with pytest.raises(ValueError, match="there is no file"):
        read_class_map("other.txt", tmp_path)
    (tmp_path / "names.pkl").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(ValueError, match=r"no \.txt"):
        read_class_map("names.pkl", tmp_path)
