"""Names of folders that matplotlib would take for formulas, or for no text, are drawn."""

from pathlib import Path

import pytest

from revnets.training.captions import caption


@pytest.mark.parametrize("name", [r"$\frac$", "a$b^$c", "$", r"\$x_{$", "\udcff", "a\nb", "ä·"])
def test_titles_of_any_name_are_drawn(name: str, tmp_path: Path) -> None:
    figure_module = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib")
    figure = figure_module.Figure()
    figure.suptitle(caption(name))
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
