"""Pictures are whole, whatever their titles; where matplotlib is missing, that is said in one line."""

import sys
from pathlib import Path

import pytest

from revnets.training.pictures import caption, picture


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    path = picture(tmp_path / "a.png", (2, 1), lambda figure: figure.subplots().plot([1, 2]), "title", dpi=50)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO"):
        assert picture(tmp_path / "a.png", (2, 1), lambda figure: 1 / 0, instead="; see a.csv") is None
    assert caplog.messages == ["no a.png: matplotlib is not installed (pip install matplotlib); see a.csv"]


@pytest.mark.parametrize("name", [r"$\frac$", "a$b^$c", "$", r"\$x_{$", "\udcff", "a\nb", "ä·"])
def test_titles_of_any_name_are_drawn(name: str, tmp_path: Path) -> None:
    figure_module = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib")
    figure = figure_module.Figure()
    figure.suptitle(caption(name))
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
