"""The tables of networks made reversible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from classification.tables import retrofit, retrofit_errors, retrofit_memory


def rows(out: Path) -> list[dict[str, object]]:
    return json.loads((out / "table.json").read_text())


def test_errors_by_depth(tmp_path: Path) -> None:
    assert retrofit_errors.Table.main(["--output", str(tmp_path), "--depths", "3"]) == 0
    found = rows(tmp_path)
    assert len(found) == len(retrofit_errors.WAYS)
    assert all((row["inversion"], row["gradient"]) == (0, 0) for row in found if str(row["way"]).endswith("exact"))
    floats = [row["inversion"] for row in found if row["way"] == "two streams, floats"]
    assert floats == sorted(floats)  # the more bits, the smaller b, the more is lost
    assert floats[0] > 0


def test_memory(tmp_path: Path) -> None:
    assert retrofit_memory.Table.main(["--output", str(tmp_path), "--networks", "test_vit", "--batch-size", "8"]) == 0
    found = {row["way"]: row["activation_mb"] for row in rows(tmp_path)}
    assert found["reversible"] < 0.5 * found["plain"]  # type: ignore[operator]


def test_memory_of_what_is_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert retrofit_memory.Table.main(["--output", str(tmp_path), "--networks", "nothing"]) == 2
    assert "--networks: nothing" in capsys.readouterr().err


def test_images_are_shifted_mirrored_and_their_own() -> None:
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    held_out = retrofit._batch(images, None)
    moved = retrofit._batch(images, torch.Generator().manual_seed(0))
    assert moved.shape == held_out.shape
    assert not moved.equal(held_out)
    for before, after in zip(held_out, moved, strict=True):
        assert set(after.flatten().tolist()) <= {0.0, *before.flatten().tolist()}


@pytest.mark.slow
def test_accuracy(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["--data-dir", str(tars), "--output", str(out), "--images", "10", "--finetune-images", "10", "--seeds", "0"]
    line += ["--epochs", "1", "--finetune-epochs", "1", "--batch-size", "5"]
    assert retrofit.Table.main(line) == 0
    found = rows(out)
    assert [(r["network"], r["training"]) for r in found] == [
        (n, t) for n in retrofit.NETWORKS for t in (retrofit.PLAIN, retrofit.REVERSIBLE)
    ]
    assert retrofit.Table.main(line) == 0
    assert rows(out) == found


def test_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert retrofit.Table.main(["--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "give the folder with train.tar and validation.tar" in capsys.readouterr().err
