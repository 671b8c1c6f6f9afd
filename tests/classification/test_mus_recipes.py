"""Recipes of munit-scaled training, the option for their rates, and the scripts that compare runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from classification.networks.models import build_model
from classification.options import TrainOptions, ValidateOptions
from classification.tables import mus as mus_table
from revnets.layers import MuSConv2d, MuSLinear
from revnets.training.options.parsing import options_of, parse, read_layers

from .short_runs import Trainer

RECIPES = sorted(path for path in mus_table.RECIPES.glob("*.yaml") if path.stem != "cifar10_short")


def options(*argv: str) -> TrainOptions:
    return parse(TrainOptions, [*argv, "--data-dir", "x", "--num-classes", "10"], "")


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
    read_layers(ValidateOptions, ["--config", str(path)], "", ignored=ignored)


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
