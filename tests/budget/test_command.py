"""``revnets fit``: what it prints and writes, and the sentences of its mistakes."""

import csv
import json
from pathlib import Path

import pytest

import tests.models.registry  # noqa: F401 - registers test_revbifpn
from revnets.cli import app


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a line."""
    with pytest.raises(SystemExit) as end:
        app(line.split())
    found = capsys.readouterr()
    return int(end.value.code or 0), found.out, found.err


def test_a_plan_is_printed_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    line = f"fit test_resnet@64:8 --budget 12MB --optimizer none --plan {plan} --picture {picture}"
    code, out, _ = run(line, capsys)
    assert code == 0
    assert "of 12.0 MB" in out
    assert "layer1" in out or "conv1" in out
    assert json.loads(plan.read_text())["budget"] == 12_000_000
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_curve_of_budgets_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(f"fit test_convnext@32:4 --sweep 3 --repeats 1 --output {tmp_path}", capsys)
    assert code == 0
    assert "its own checkpointing" in out
    with (tmp_path / "test_convnext.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["way"] == "plan"]
    assert len(rows) == 3
    measured = [int(row["measured_bytes"]) for row in rows]
    assert measured == sorted(measured)
    for row in rows:
        assert int(row["measured_bytes"]) <= int(row["budget_bytes"])
        assert int(row["measured_bytes"]) == pytest.approx(int(row["predicted_bytes"]), rel=0.05)
    assert (tmp_path / "test_convnext.png").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fit test_resnet@64:8", ["--budget or --sweep"]),
        ("fit test_resnet@64:8 --budget 8", ["budget '8'"]),
        ("fit test_resnet@64:8 --budget 1KB", ["needs at least", "1,000 bytes"]),
        ("fit test_resnet@64:8 --budget 1GB --amp bf17", ["bf17", "bfloat16"]),
        ("fit no_such_net@64:8 --budget 1GB", ["no_such_net"]),
        ("fit test_resnet@64:8 --budget 1GB --plan /no/such/folder/plan.json", ["/no/such/folder"]),
        ("fit test_resnet@64:8 --sweep 3 --plan plan.json", ["--plan has no effect"]),
        ("fit test_resnet@64:8 --budget 1GB --repeats 3", ["--repeats has no effect"]),
        ("fit test_resnet@64:8 --budget 1GB --peers", ["--peers has no effect without --sweep"]),
        ("fit test_resnet@64:8 --budget 1GB --batch-size 3", ["--batch-size has no effect"]),
    ],
    ids=["neither", "no unit", "too small", "amp", "model", "folder", "plan", "repeats", "peers", "batch"],
)
def test_mistakes_end_with_one_sentence(line: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(line, capsys)
    assert code == 2
    assert "Traceback" not in err
    assert all(word in " ".join(err.split()) for word in words), err
