"""The quickstart on few images."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

import revnets  # noqa: F401
from classification import quickstart

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def test_final_line_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not timm.is_model("test_revbifpn"):
        pytest.skip("test_revbifpn is not registered")
    line = ["--output", str(tmp_path / "q"), "--model", "test_revbifpn", "--epochs", "1", "--limit", "64"]
    assert quickstart.main(line) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "% accuracy" in last
    assert "MB in reversible mode" in last
    assert (tmp_path / "q" / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert quickstart.main(line) == 0  # again, over its own results


def test_another_kind_of_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["--output", str(tmp_path), "--model", "test_resnet", "--epochs", "1"]) == 2
    assert "test_resnet" in capsys.readouterr().err
