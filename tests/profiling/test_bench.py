"""The bench command: rows, ratios, files, and errors in one sentence."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from revnets.cli import app
from revnets.profiling.bench import Case, Row, parse_case, ratios


def test_parse_case() -> None:
    assert parse_case("revbifpn_s0@256:4")[0] == Case("revbifpn_s0", 256, 4, "reversible")
    assert parse_case("revbifpn_s3")[0].img_size == 288
    assert [c.mode for c in parse_case("resnet18")] == ["store", "checkpoint"]
    with pytest.raises(ValueError, match="unknown model 'revbifpn_s9'"):
        parse_case("revbifpn_s9")
    with pytest.raises(ValueError, match="expected NAME@SIZE:BATCH"):
        parse_case("resnet18@big")


def test_ratios_are_to_storing() -> None:
    rows = [Row(Case("m", 1, 1, "reversible"), 3.0, 10.0), Row(Case("m", 1, 1, "store"), 2.0, 100.0)]
    assert [(t, m) for _, t, m in ratios(rows)] == [(1.5, 0.1), (1.0, 1.0)]


def test_bench_command(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", "test_revbifpn@32:2", "--repeats", "1", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "reversible" in result.output
    data = json.loads(output.read_text())
    assert {r["case"]["mode"] for r in data["rows"]} == {"reversible", "checkpoint", "store"}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("arguments", [["nonsense"], ["test_revbifpn@33:2"], ["resnet18@x"]])
def test_errors_are_one_sentence(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert "revnets: " in result.output
    assert "Traceback" not in result.output
