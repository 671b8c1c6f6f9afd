"""The table of sparse pre-training and dense fine-tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from classification.tables import spdf as spdf_table

from .recipes import recipe


@pytest.mark.slow
def test_table_of_sparse_pretraining(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["--config", str(recipe(tars, tmp_path)), "--output", str(out), "--images", "10", "--finetune-images", "10"]
    line += ["--epochs", "1", "--finetune-epochs", "1", "--seeds", "0", "1", "--sparsities", "0", "0.75"]
    assert spdf_table.Table.main(line) == 0
    rows = json.loads((out / "table.json").read_text())
    assert [(row["sparsity"], row["seed"]) for row in rows] == [(s, k) for k in (0, 1) for s in ("none", "0", "0.75")]
    dense, sparse = (row["pretrain_flops"] for row in rows[1:3])
    assert 0.25 < sparse / dense < 0.5
    shutil.rmtree(out / next(path.name for path in out.glob("finetune-0.75*seed0*") if path.is_dir()))
    assert spdf_table.Table.main(line) == 0
    assert json.loads((out / "table.json").read_text()) == rows
