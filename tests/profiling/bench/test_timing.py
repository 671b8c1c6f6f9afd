"""The bench command: rows, ratios, files, and errors in one sentence."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from revnets.cli import app
from revnets.layers import is_lean
from revnets.profiling.bench.ablation import AS_IT_IS, VARIANTS
from revnets.profiling.bench.timing import Case, Row, make_cases, ratios
from revnets.profiling.target import Setting, Target

SETTING = Setting(optimizer=None)


def test_cases() -> None:
    cases = make_cases(["revbifpn_s0@256:4", "resnet18"], "", SETTING)
    assert cases[0].target == Target("revbifpn_s0", 256, 4, "reversible")
    assert [c.target.mode for c in cases] == ["reversible", "store", "checkpoint", "store", "checkpoint"]
    assert make_cases(["revbifpn_s3"], "store", SETTING)[0].target.img_size == 288
    with pytest.raises(ValueError, match="unknown model 'revbifpn_s9': did you mean revbifpn_s"):
        make_cases(["revbifpn_s9"], "", SETTING)
    with pytest.raises(ValueError, match="expected NAME@SIZE:BATCH"):
        make_cases(["resnet18@big"], "", SETTING)


def test_lean_is_a_mode_of_every_network_when_asked_for() -> None:
    cases = make_cases(["resnet18", "test_revbifpn@64:2"], "plain,lean", SETTING)
    assert [(c.target.name, c.target.mode_name) for c in cases] == [
        ("resnet18", "plain"),
        ("resnet18", "lean"),
        ("test_revbifpn", "store"),
        ("test_revbifpn", "lean"),
    ]
    job = make_cases(["test_resnet@64:2"], "lean", SETTING)[0].target.build(SETTING, "meta")
    assert is_lean(job.network)
    with pytest.raises(ValueError, match=r"unknown mode 'leen'.*did you mean 'lean'"):
        make_cases(["resnet18"], "leen", SETTING)


def test_ablation_leaves_out_one_thing_at_a_time() -> None:
    cases = make_cases(["revbifpn_s0@256:4", "resnet18"], "reversible,store", SETTING, ablate=True, compiled=True)
    assert [c.variant for c in cases if c.target.mode == "reversible"] == list(VARIANTS)
    assert all(c.variant == AS_IT_IS for c in cases if c.target.mode == "store")


def test_ratios_are_to_storing() -> None:
    reversible, store = Target("m", 1, 1, "reversible"), Target("m", 1, 1, "store")
    rows = [Row(Case(reversible), 3.0, 10.0), Row(Case(reversible, "plain layers"), 4.0, 20.0)]
    assert [(t, m) for _, t, m in ratios([*rows, Row(Case(store), 2.0, 100.0)])] == [(1.5, 0.1), (2.0, 0.2), (1.0, 1.0)]


def test_bench_command(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", "test_revbifpn@32:2", "--repeats", "1", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "reversible" in result.output
    data = json.loads(output.read_text())
    assert {r["case"]["target"]["mode"] for r in data["rows"]} == {"reversible", "checkpoint", "store"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("arguments", [["nonsense"], ["test_revbifpn@33:2"], ["resnet18@x"]])
def test_errors_are_one_sentence(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert "revnets: " in result.output
    assert "Traceback" not in result.output
