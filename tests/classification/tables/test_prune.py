"""The table of pruned networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from classification.tables import prune as prune_table

from ..test_train_pruned import zeros
from ..test_train_run import load
from .recipes import recipe


@pytest.mark.slow
def test_table_of_pruning_runs_what_is_missing(
    tars: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    line = ["--configs", str(recipe(tars, tmp_path)), "--output", str(out), "--images", "20", "--calibration", "20"]
    line += ["--targets", "0.7", "2:4", "--methods", "sparsegpt", "magnitude", "--epochs", "1"]
    assert prune_table.Table.main(line) == 0
    rows = json.loads((out / "table.json").read_text())
    stages = [(row["stage"], row["target"]) for row in rows[5:]]
    assert [row["stage"] for row in rows[:5]] == ["dense", *["one-shot"] * 4]
    steps = [("one-shot", "0.5"), ("retrained", "0.5"), ("pruned again", "0.7"), ("retrained", "0.7")]
    assert stages == [*steps, ("distilled", "0.7"), ("dense, trained on", "-"), ("INT8", "-"), ("INT8", "0.7")]
    half, both = (
        load(next(out.glob(f"*{end}")) / "last.pth.tar")["state_dict"]
        for end in ("0.5-20-retrained-1x0.3", "distilled-1x0.3")
    )
    assert zeros(half)
    for name, mask in zeros(half).items():
        assert (both[name] == 0)[mask].all(), "zeros stay in the second step"
    *stages, trained_on = (row["train_flops"] for row in rows if row["train_flops"] and row["stage"] != "dense")
    assert trained_on == pytest.approx(3 * rows[0]["train_flops"])  # one epoch for each of the stages
    assert len(stages) == 3
    assert max(stages) < rows[0]["train_flops"]
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth.tar")}
    assert prune_table.Table.main(line) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*.pth.tar")}
    assert "distilled" in capsys.readouterr().out
    assert prune_table.Table.main([*line, "--targets", "1.5"]) == 2
    assert "'1.5' was given" in capsys.readouterr().err
