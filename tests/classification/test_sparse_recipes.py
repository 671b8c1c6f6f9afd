"""The recipes of sparse iso-FLOP training, what they need of the scripts, and the table over seeds."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from classification.networks.models import build_model
from classification.options import TrainOptions, ValidateOptions
from revnets.training.errors import UserError
from revnets.training.options.parsing import options_of, parse, read_layers

from .short_runs import ROOT, Trainer

RECIPES = sorted((ROOT / "configs" / "classification" / "sparse_ift").glob("*.yaml"))


def options(*argv: str) -> TrainOptions:
    return parse(TrainOptions, [*argv, "--data-dir", "x"], "")


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
    read_layers(ValidateOptions, ["--config", str(path)], "", ignored=ignored)


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
