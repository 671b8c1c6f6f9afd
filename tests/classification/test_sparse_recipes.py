"""The recipes of sparse iso-FLOP training, what they need of the scripts, and the table over seeds."""

from __future__ import annotations

import shlex
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

from classification import train
from classification.models import build_model
from classification.options import TrainOptions, ValidateOptions
from classification.tables import sparse as sparse_table
from revnets.sparsity import sparse_layers
from revnets.training.errors import UserError
from revnets.training.options.parsing import options_of, read_yaml

from .short_runs import ROOT, Trainer

RECIPES = sorted((ROOT / "configs" / "classification" / "sparse_ift").glob("*.yaml"))


def options(*argv: str) -> TrainOptions:
    return train.parse(TrainOptions, [*argv, "--data-dir", "x"], "")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_with_every_member_and_schedule(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(("# python ", "# torchrun "))
    assert path.name in lines[0]
    variants = [line.removeprefix("#").split("  ")[1].strip() for line in lines if line.startswith("#   --")]
    for more in ["", *(v for v in variants if v)]:
        got = options("--config", str(path), *shlex.split(more))
        got.check()
        if path.stem != "cifar10_small":
            assert ("sparse_" in got.layers) == ("''" not in more)
            assert got.sparsity_schedule in ("rigl", "set", "static")
    ignored = frozenset(set(options_of(TrainOptions)) - set(options_of(ValidateOptions)))
    read_yaml(path, options_of(ValidateOptions), ignored)


@pytest.mark.parametrize("member", sparse_table.MEMBERS)
def test_small_network_of_the_table_takes_every_member(member: str) -> None:
    small = options("--config", str(sparse_table.CONFIG), "--layers", f"{member}:0.75", "--num-classes", "10")
    model = build_model(small)
    assert sparse_layers(model)
    assert model(torch.ones(2, 3, 32, 32)).shape == (2, 10)


def test_stem_of_small_images() -> None:
    plain = build_model(options("--model", "resnet18", "--small-stem", "1"))
    assert isinstance(plain.conv1, nn.Conv2d)
    assert (plain.conv1.kernel_size, plain.conv1.stride) == ((3, 3), (1, 1))
    assert plain.forward_features(torch.ones(1, 3, 32, 32)).shape[2:] == (4, 4)  # type: ignore[operator]
    with pytest.raises(UserError, match="no ResNet"):
        build_model(options("--model", "test_efficientnet", "--small-stem", "1"))


def test_crop_with_a_border(run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train("--epochs", "1", "--crop-pad", "4") == 0
    assert run_train("--epochs", "1", "--crop-pad", "4", "--no-aug", "--experiment", "other") == 2
    assert "--crop-pad" in capsys.readouterr().err


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
    assert sparse_table.Table.main(["--output", str(tmp_path / "out"), *more]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tars(digits: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}.tar", "w") as file:
            file.add(digits / split, arcname=split)
    return folder


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
