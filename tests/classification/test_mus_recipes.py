"""Recipes of munit-scaled training, the option for their rates, and the scripts that compare runs."""

from __future__ import annotations

import json
import math
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from classification import train
from classification.models import build_model
from classification.options import TrainOptions, ValidateOptions
from classification.tables import lr_transfer
from classification.tables import mus as mus_table
from classification.tables.lr_transfer import Best, Proxy
from classification.tables.mus import Outcome
from revnets.layers import MuSConv2d, MuSLinear
from revnets.training.errors import UserError
from revnets.training.options.parsing import options_of, read_yaml

from .short_runs import Trainer

RECIPES = sorted(path for path in mus_table.RECIPES.glob("*.yaml") if path.stem != "cifar10_short")


def options(*argv: str) -> TrainOptions:
    return train.parse(TrainOptions, [*argv, "--data-dir", "x", "--num-classes", "10"], "")


SLOW = pytest.mark.slow  # conversion follows RevBiFPN's layers


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[SLOW] if p.stem == "cifar10_revbifpn-s0" else []) for p in RECIPES],
)
def test_recipes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# python classification/train.py")
    assert path.name in lines[0]
    layers = [] if "standard" in path.stem else [layers for layers in mus_table.VARIANTS.values() if layers]
    option = ["--layers", "{}"] if "revbifpn" in path.stem else ["--model-kwargs", "layers={}"]
    for more in [[], *([option[0], option[1].format(each)] for each in layers)]:
        got = options("--config", str(path), *more)
        got.check()
        model = build_model(got)
        scaled = [module for module in model.modules() if isinstance(module, MuSLinear | MuSConv2d)]
        assert bool(scaled) == (got.mus_base_width is not None) == ("standard" not in path.stem)
        assert any(module.fp8 for module in scaled) == (more != [] and "mus_fp8" in more[-1])
        assert model(torch.ones(2, 3, 32, 32)).shape == (2, 10)
    ignored = frozenset(set(options_of(TrainOptions)) - set(options_of(ValidateOptions)))
    read_yaml(path, options_of(ValidateOptions), ignored)


@pytest.mark.parametrize("network", [pytest.param("revbifpn-s0", marks=SLOW), "mus-vit-tiny"])
def test_networks_of_a_comparison_have_the_same_size(network: str) -> None:
    paths = [str(mus_table.RECIPES / f"cifar10_{network}{suffix}.yaml") for suffix in ("", "_standard")]
    models = [build_model(options("--config", path)) for path in paths]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert sizes[0] == sizes[1]
    assert network in mus_table.NETWORKS


def test_rates_of_munit_scaled_layers(run_train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "test_mus_vit", "--model-kwargs", "img_size=32", "patch_size=8", "depth=1"]
    assert run_train(*small, "--epochs", "1", "--mus-base-width", "16", "--lr", "0.02", "--weight-decay", "1e-4") == 0
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)["optimizer"]
    assert {group["initial_lr"] for group in state["param_groups"]} == {0.01, 0.02}
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.0, 1e-4 / 0.01, 1e-4 / 0.02}
    capsys.readouterr()
    for more, words in (
        (["--model", "test_efficientnet"], "--mus-base-width: mus_param_groups: EfficientNet has no munit-scaled"),
        ([*small, "--layer-decay", "0.9"], "--mus-base-width and --layer-decay"),
        ([*small, "--mus-base-width", "0"], "--mus-base-width: '0'"),
    ):
        assert run_train(*(["--mus-base-width", "64"] if "0" not in more else []), *more, "--experiment", "x") == 2
        message = capsys.readouterr().err
        assert words in message
        assert len(message.splitlines()) == 1


# --- the table -------------------------------------------------------------------------------------------------------


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


# --- learning rates across widths ------------------------------------------------------------------------------------


def test_best_rate_and_its_move() -> None:
    losses = {
        Proxy(rules, width, 2.0**power): (power - best) ** 2
        for rules, width, best in (("with", 64, -5.0), ("with", 512, -5.2), ("without", 64, -5), ("without", 512, -6.5))
        for power in range(-8, -2)
    }
    losses[Proxy("with", 64, 0.5)] = math.nan
    found = [lr_transfer.best(rules, width, losses) for rules in lr_transfer.RULES for width in (64, 512)]
    assert [each.lr for each in found[:3]] == [2**-5] * 3
    assert found[1].vertex == pytest.approx(2**-5.2)
    assert lr_transfer.moved(found, "with") == (0, pytest.approx(-0.2))
    assert lr_transfer.moved(found, "without")[1] == pytest.approx(-1.5)
    with pytest.raises(UserError, match="no loss stayed finite"):
        lr_transfer.best("with", 64, {Proxy("with", 64, 0.5): math.nan})


def test_transfer_runs_what_is_missing(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--data", str(digits / "train"), "--output", str(tmp_path / "out"), "--widths", "32", "64"]
    line += ["--steps", "3", "--average", "2", "--batch-size", "8", "--depth", "1", "--base-width", "32"]
    line += ["--lowest", "-6", "--highest", "-4"]
    assert lr_transfer.Table.main(line) == 0
    assert "with the rules, the best rate moves by" in capsys.readouterr().out
    proxies = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "proxies").iterdir()}
    assert len(proxies) == 3 + 2 * 3, "at the base width the rules change nothing"
    assert lr_transfer.Table.main(line) == 0
    assert proxies == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "proxies").iterdir()}
    content = json.loads((tmp_path / "out" / "lr_transfer.json").read_text())
    assert len(content["proxies"]) == 2 * 2 * 3
    assert all(len(each["curve"]) == 3 for each in content["proxies"])
    assert [Best(**each).width for each in content["best"]] == [32, 64, 32, 64]
    assert len((tmp_path / "out" / "lr_transfer.csv").read_text().splitlines()) == 1 + 12
    assert (tmp_path / "out" / "lr_transfer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--widths", "48"], "--widths: 48 is no multiple"),
        (["--lowest", "-4"], "--lowest: "),
        (["--data", "nowhere"], "--data: 'nowhere'"),
        (["--steps", "500"], "each is seen once"),
        (["--layers", "sparse:0.5", "--steps", "1"], "expected 'mus' or 'mus_fp8' alone"),
    ],
)
def test_mistakes_of_the_transfer(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    line = ["--data", str(digits / "train"), "--output", str(tmp_path), "--batch-size", "8"]
    assert lr_transfer.Table.main([*line, *more]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message
