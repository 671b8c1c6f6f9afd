"""The quickstart on few images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import revnets  # noqa: F401
from classification import quickstart

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


LITTLE = ["--model", "test_revbifpn", "--epochs", "1", "--limit", "64"]


def test_final_line_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "activation_memory", lambda *_: {"reversible": 2_000_000, "store": 9_000_000})
    for _ in range(2):  # the second time over its own results
        assert quickstart.main(["--output", str(tmp_path / "q"), *LITTLE]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "% accuracy" in last
    assert "at 2.0 MB in reversible mode and 9.0 MB when stored, 4.5 times" in last
    assert (tmp_path / "q" / "quickstart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_storing_takes_more_memory_than_reversing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["--output", str(tmp_path), *LITTLE]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.search(r"peak at ([\d.]+) MB in reversible mode and ([\d.]+) MB", last)
    assert found is not None, last
    assert 0 < 3 * float(found[1]) < float(found[2])


def test_another_kind_of_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["--output", str(tmp_path), "--model", "test_resnet", "--epochs", "1"]) == 2
    assert "test_resnet" in capsys.readouterr().err
