"""The table of pruned networks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from classification.tables import prune as prune_table
from classification.tables.prune_target import Target

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
    line += ["--targets", "0.7", "2:4", "4x1:0.7", "--methods", "sparsegpt", "magnitude", "--epochs", "1"]
    assert prune_table.Table.main(line) == 0
    rows = json.loads((out / "table.json").read_text())
    stages = [(row["stage"], row["target"]) for row in rows[7:]]
    assert [row["stage"] for row in rows[:7]] == ["dense", *["one-shot"] * 6]
    steps = [("one-shot", "0.5"), ("retrained", "0.5"), ("pruned again", "0.7"), ("retrained", "0.7")]
    quantised = [(stage, target) for stage in ("INT8", "INT8, sparse") for target in ("-", "0.7")]
    assert stages == [*steps, ("distilled", "0.7"), ("dense, trained on", "-"), *quantised]
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


@pytest.mark.slow
def test_pattern_of_the_int8_kernel_beside_single_weights(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["--configs", str(recipe(tars, tmp_path)), "--output", str(out), "--images", "20", "--calibration", "20"]
    line += [
        "--targets",
        "0.6",
        "4x1:0.6",
        "--recover",
        "4x1:0.6",
        "4x1:0.7",
        "--steps",
        "0.6",
        "--methods",
        "magnitude",
    ]
    assert (
        prune_table.Table.main([*line, "--epochs", "1", "--int8", "sparse", "--int8-one-shot", "--no-trained-on"]) == 0
    )
    rows = json.loads((out / "table.json").read_text())
    stages = [(row["stage"], row["target"]) for row in rows]
    assert len(set(stages)) == len(stages), "what two targets share is one line"
    assert {target for stage, target in stages if stage == "one-shot, INT8, sparse"} == {"0.6", "4x1:0.6"}
    assert {target for stage, target in stages if stage == "INT8, sparse"} == {"-", "4x1:0.6", "4x1:0.7"}
    assert ("dense, trained on", "-") not in stages
    (one_shot,) = out.glob("*-magnitude-4x1-0.6-20.safetensors")
    (again,) = out.glob("*-4x1-0.7-20.safetensors")
    before, after = load_file(one_shot), load_file(again)
    found = {
        name: weight
        for name, weight in after.items()
        if weight.dim() == 4 and float((weight == 0).float().mean()) > 0.5
    }
    assert found
    for name, weight in found.items():
        blocks = (weight == 0).unflatten(1, (-1, 4))
        assert (blocks.all(2) == blocks.any(2)).all(), "zeros come in whole blocks of four input channels"
        assert (weight[before[name] == 0] == 0).all()


def test_targets() -> None:
    texts = ("0.7", "4x1:0.95", "2:4")
    assert [str(Target.parse(text)) for text in texts] == list(texts)
    assert len({Target.parse(text).word for text in texts}) == 3
    assert not any(":" in Target.parse(text).word for text in texts)
    assert [str(t) for t in Target.parse("2:4").after([0.2])] == ["2:4"]
    for text in ("4x1", "4x1:", "4x1:2:4", "4x1:1", "1", "0", "nan", "4:2", "2x1:0.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="was expected"):
            Target.parse(text)
