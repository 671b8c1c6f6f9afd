"""The stand-in as a file in mmcv's folder: whose file it is, and what it does when it is imported."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
operators = pytest.importorskip("revnets.mm.operators", reason=REASON, exc_type=ImportError)

from revnets.mm.__main__ import main  # noqa: E402
from revnets.mm.operators import plug_in  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of mmcv's."""
    made = tmp_path / "mmcv"
    made.mkdir()
    monkeypatch.setattr(plug_in, "_folder", lambda: made)
    return made


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("an_extension", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_the_operators(folder: Path) -> None:
    path = plug_in.add()
    assert path == folder / "_ext.py"
    module = imported(path)
    boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.5]]), torch.tensor([0.5, 0.75])
    assert module.nms(boxes, scores, iou_threshold=0.5, offset=0).tolist() == [1]
    assert hasattr(module, "nms_rotated")
    with pytest.raises(operators.MissingOperatorError, match="'nms_rotated' needs mmcv's compiled"):
        module.nms_rotated()
    assert not hasattr(module, "__wrapped__")


def test_nothing_of_ours_is_imported_with_it(folder: Path) -> None:
    """mmdet.models imports it, and revnets.mm imports mmdet.models."""
    before = set(sys.modules)
    imported(plug_in.add() or folder)
    assert not {name for name in set(sys.modules) - before if name.startswith(("revnets", "mm"))}


def test_added_twice_and_removed(folder: Path) -> None:
    assert plug_in.add() == plug_in.add() == plug_in.remove() == folder / "_ext.py"
    assert plug_in.remove() is None
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["_ext.py", "_ext" + importlib.machinery.EXTENSION_SUFFIXES[0]])
def test_anothers_file_stays(folder: Path, name: str) -> None:
    (folder / name).write_text("theirs = True\n")
    assert plug_in.is_compiled()
    assert plug_in.add() is None
    assert plug_in.remove() is None
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "theirs = True\n")]


def test_a_compiled_one_wins_over_it(folder: Path) -> None:
    plug_in.add()
    (folder / f"_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"")
    assert plug_in.is_compiled()


def test_with_it_there_the_stand_in_is_still_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plug_in.add()
    spec = importlib.machinery.ModuleSpec("of_a_test._ext", None, origin=str(path))
    monkeypatch.setattr(operators, "NAME", spec.name)
    monkeypatch.setattr(operators.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.delitem(sys.modules, spec.name, raising=False)
    assert operators.install() is True
    monkeypatch.delitem(sys.modules, spec.name)
    monkeypatch.setitem(sys.modules, spec.name, imported(path or folder))  # mmcv.ops was imported before
    assert operators.install() is True


def test_on_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(word: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["revnets.mm", word])
        return main(), *capsys.readouterr()

    assert run("--install") == (0, f"mmcv.ops finds '{folder / '_ext.py'}'\n", "")
    assert run("--uninstall") == (0, f"'{folder / '_ext.py'}' is removed\n", "")
    assert run("--uninstall") == (0, "there is nothing to remove\n", "")
    (folder / "_ext.py").write_text("theirs = True\n")
    assert run("--install") == (0, "mmcv has compiled operators: there is nothing to install\n", "")
    (folder / "_ext.py").unlink()
    folder.rmdir()
    code, _, said = run("--install")
    assert code == 2
    assert said.startswith("error: ")
    assert "cannot be written" in said
