"""The table of standard, munit-scaled and FP8 layers over seeds."""

from __future__ import annotations

import json
import math
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest

from classification.tables import mus as mus_table
from classification.tables.mus import Outcome


def test_table_compares_seeds_in_pairs() -> None:
    found = [
        Outcome("net", line, seed, top1 + seed, 1.0, 1.0, 2)
        for line, top1 in (("mus", 50.0), ("mus_fp8", 49.75))
        for seed in (0, 2)
    ]
    table = mus_table.Table(Namespace(output="")).shown(found)
    cells = {line: [column._cells[row] for column in table.columns] for row, line in enumerate(("mus", "fp8"))}
    assert cells["mus"][3:6] == ["51.00", "1.41", "-"]
    assert cells["fp8"][3:6] == ["50.75", "1.41", "-0.25"]
    broken = [Outcome("net", "mus_fp8-lr2x", 0, math.nan, math.nan, math.nan, 2)]
    row = [column._cells[0] for column in mus_table.Table(Namespace(output="")).shown(broken).columns]
    assert row[-1] == "1"


@pytest.mark.slow
def test_table_runs_what_is_missing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tars, recipes, output = tmp_path / "tars", tmp_path / "recipes", tmp_path / "out"
    tars.mkdir()
    recipes.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(tars / f"{split}.tar", "w") as file:
            file.add(digits / split, arcname=split)
    shared = f"data_dir: {tars}\ntrain_split: train.tar\nval_split: validation.tar\nimg_size: 32\nbatch_size: 10\n"
    shared += "workers: 0\nwarmup_epochs: 0\nopt: adamw\ndevice: cpu\n"
    size = "model_kwargs: {img_size: 32, patch_size: 8, embed_dim: 64, depth: 1, num_heads: 2, layers: %s}\n"
    scaled = shared + "model: test_mus_vit\nlr: 0.01\nmus_base_width: 64\n" + size % "'mus:init'"
    (recipes / "cifar10_mus-vit-tiny.yaml").write_text(scaled)
    plain = shared + "model: vit_tiny_patch16_224\nlr: 0.001\n" + size % "null"
    (recipes / "cifar10_mus-vit-tiny_standard.yaml").write_text(plain)
    monkeypatch.setattr(mus_table, "RECIPES", recipes)
    line = ["--networks", "mus-vit-tiny", "--output", str(output), "--images", "20", "--epochs", "1", "--seeds", "0"]
    line += ["--runs", "standard", "mus_fp8", "mus_fp8-lr2x"]
    assert mus_table.Table.main(line) == 0
    assert "mus_fp8-lr2x" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.pth.tar")}
    assert len(before) >= 3
    assert mus_table.Table.main(line) == 0
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.pth.tar")}
    content = json.loads((output / "table.json").read_text())
    assert [each["line"] for each in content] == ["standard", "mus_fp8", "mus_fp8-lr2x"]
    assert [each["lr"] for each in content] == [0.001, 0.01, 0.02]
    assert all(len(each["curves"]["train_loss"]) == 1 for each in content)
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_finite_is_an_outcome(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert not mus_table._not_finite(log)
    log.write_text("epoch 0\nerror: the loss is nan at step 3 of epoch 1, a finite number was expected; lower --lr\n")
    assert mus_table._not_finite(log)
    log.write_text("error: the loss is nan at step 3\nepoch 0 (100% of the run)\n")
    assert not mus_table._not_finite(log), "the run went on"
