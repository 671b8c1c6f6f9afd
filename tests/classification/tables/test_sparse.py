"""The table of sparse members and schedules over seeds."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from classification.networks.models import build_model
from classification.tables import sparse as sparse_table
from revnets.sparsity import sparse_layers

from ..test_sparse_recipes import options


@pytest.mark.parametrize("member", sparse_table.MEMBERS)
def test_small_network_of_the_table_takes_every_member(member: str) -> None:
    small = options("--config", str(sparse_table.CONFIG), "--layers", f"{member}:0.75", "--num-classes", "10")
    model = build_model(small)
    assert sparse_layers(model)
    assert model(torch.ones(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--jobs", "0"], "--jobs: '0'"),
        (["--sparsity", "1.5"], "--sparsity: '1.5'"),
        (["--epochs", "0"], "--epochs: '0'"),
        (["--output", __file__], "--output: "),
        (["--sparsty", "0.5"], "--sparsty"),
    ],
)
def test_mistakes_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    assert sparse_table.Table.main(["--output", str(tmp_path / "out"), "--data-dir", "x", *more]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_table_runs_what_is_missing(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data_dir: {tars}\ntrain_split: train.tar\nval_split: validation.tar\nmodel: test_resnet\nimg_size: 32\n"
        "batch_size: 10\nworkers: 0\nwarmup_epochs: 0\nlr: 0.01\nsparsity_interval: 1\ndevice: cpu\n"
    )
    line = ["--config", str(recipe), "--output", str(tmp_path / "out"), "--images", "20", "--epochs", "1"]
    line += ["--runs", "dense", "sparse_parallel-rigl", "--seeds", "0"]
    assert sparse_table.Table.main(line) == 0
    shown = capsys.readouterr().out
    assert "dense" in shown
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pth.tar")}
    assert len(before) >= 2
    assert sparse_table.Table.main(line) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pth.tar")}
    table = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table] == ["name", "dense", "sparse_parallel-rigl"]
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")
    (data,) = (tmp_path / "out").glob("data-20-*")
    with tarfile.open(data / "train.tar") as file:
        assert len(file.getnames()) == 20
    assert sparse_table.Table.main([*line, "--runs", "sparse_deep-rigl"]) == 2
    assert "sparse_deep-rigl" in capsys.readouterr().err
    assert sparse_table.Table.main([*line, "--images", "900"]) == 2
    assert "--images" in capsys.readouterr().err
