"""A YAML file of options: what is read, and what is refused in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from revnets.training.errors import UserError
from revnets.training.options.yaml_files import BYTES, load


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "given.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 1\nepochs: 2\nlr: 3\n", ["'lr'", "line 1", "line 3"]),
        ("model_kwargs:\n  depth: 1\n  depth: 2\n", ["'depth'", "line 2", "line 3"]),
        ("a:\n  - {x: 1, y: 2, x: 1}\n", ["'x'", "line 2"]),
        ("'lr': 1\nlr: 1\n", ["'lr'"]),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  y: 1\n  y: 2\n", ["'y'"]),
    ],
)
def test_a_key_twice(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(written(tmp_path, text), "--config")
    assert all(word in str(caught.value) for word in ["given.yaml", *words]), str(caught.value)


def test_anchors_and_merged_mappings_are_plain_yaml(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 1}\nb:\n  <<: *a\n  y: 2\nc: {y: 1}\nd: {y: 1}\n"
    assert load(written(tmp_path, text), "--config") == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 1, "y": 2},
        "c": {"y": 1},
        "d": {"y": 1},
    }


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "deep": ("mean: " + "[" * 1500 + "]" * 1500, "nested too deep"),
    "deep mapping": ("mean: " + "{a: " * 1500 + "1" + "}" * 1500, "nested too deep"),
    "a long number": ("seed: " + "8" * 5000, "not valid YAML"),
    "no date": ("model_kwargs: {a: 2020-13-45}", "not valid YAML"),
    "no time": ("a: !!timestamp soon", "not valid YAML"),
    "no bool": ("a: !!bool soon", "not valid YAML"),
    "no int": ("a: !!int ''", "not valid YAML"),
    "code": ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    "a tag of its own": ("a: !thing {}", "not valid YAML"),
    "zero bytes": (b"a: \0", "not valid YAML"),
    "latin-1": ("a: \xe4".encode("latin-1"), "not valid YAML"),
    "numbers as keys": ("1: 2", "the key 1"),
    "nothing as key": ("~: 2", "the key None"),
    "lists as keys": ("? [1, 2]\n: 3", "not valid YAML"),
    "two documents": ("a: 1\n---\na: 2\n", "not valid YAML"),
    "no such anchor": ("a: *nowhere", "not valid YAML"),
    "laughs": (BOMB, "aliases"),
    "itself": ("a: &a [*a]", "aliases"),
    "too large": ("a: " + "x" * BYTES, "larger than"),
    "a list": ("- a", "list"),
    "a number": ("3", "int"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_file_of_options(what: str, tmp_path: Path) -> None:
    text, words = REFUSED[what]
    with pytest.raises(UserError, match=r"^--config: '.*given\.yaml'") as caught:
        load(written(tmp_path, text), "--config")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path,
        tmp_path / "loop",
        tmp_path / "pipe",
        Path("/dev/zero"),
        tmp_path / ("x" * 300),
        Path("a\0b"),
    ):
        with pytest.raises(UserError, match="give an existing YAML file"):
            load(path, "--config")


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load(written(tmp_path, "# later\n"), "--config") == {}
