"""Learning rates across widths."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from classification.tables import lr_transfer
from classification.tables.lr_transfer import Best, Proxy
from revnets.training.errors import UserError


def test_best_rate_and_its_move() -> None:
    losses = {
        Proxy(rules, width, 2.0**power): (power - best) ** 2
        for rules, width, best in (("with", 64, -5.0), ("with", 512, -5.2), ("without", 64, -5), ("without", 512, -6.5))
        for power in range(-8, -2)
    }
    losses[Proxy("with", 64, 0.5)] = math.nan
    found = [lr_transfer.best(rules, width, losses) for rules in lr_transfer.RULES for width in (64, 512)]
    assert [each.lr for each in found[:3]] == [2**-5] * 3
    assert found[1].vertex == pytest.approx(2**-5.2)
    assert lr_transfer.moved(found, "with") == (0, pytest.approx(-0.2))
    assert lr_transfer.moved(found, "without")[1] == pytest.approx(-1.5)
    with pytest.raises(UserError, match="no loss stayed finite"):
        lr_transfer.best("with", 64, {Proxy("with", 64, 0.5): math.nan})


def test_transfer_runs_what_is_missing(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--data", str(digits / "train"), "--output", str(tmp_path / "out"), "--widths", "32", "64"]
    line += ["--steps", "3", "--average", "2", "--batch-size", "8", "--depth", "1", "--base-width", "32"]
    line += ["--lowest", "-6", "--highest", "-4"]
    assert lr_transfer.Table.main(line) == 0
    assert "with the rules, the best rate moves by" in capsys.readouterr().out
    proxies = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "proxies").iterdir()}
    assert len(proxies) == 3 + 2 * 3, "at the base width the rules change nothing"
    assert lr_transfer.Table.main(line) == 0
    assert proxies == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "proxies").iterdir()}
    content = json.loads((tmp_path / "out" / "lr_transfer.json").read_text())
    assert len(content["proxies"]) == 2 * 2 * 3
    assert all(len(each["curve"]) == 3 for each in content["proxies"])
    assert [Best(**each).width for each in content["best"]] == [32, 64, 32, 64]
    assert len((tmp_path / "out" / "lr_transfer.csv").read_text().splitlines()) == 1 + 12
    assert (tmp_path / "out" / "lr_transfer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--widths", "48"], "--widths: 48 is no multiple"),
        (["--lowest", "-4"], "--lowest: "),
        (["--data", "nowhere"], "--data: 'nowhere'"),
        (["--steps", "500"], "each is seen once"),
        (["--layers", "sparse:0.5", "--steps", "1"], "expected 'mus' or 'mus_fp8' alone"),
    ],
)
def test_mistakes_of_the_transfer(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    line = ["--data", str(digits / "train"), "--output", str(tmp_path), "--batch-size", "8"]
    assert lr_transfer.Table.main([*line, *more]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message
