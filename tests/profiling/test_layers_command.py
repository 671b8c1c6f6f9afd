"""``revnets layers``: the registry and conversions on the terminal."""

import csv
import json
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from revnets.cli import app
from revnets.layers import convert, list_layers
from revnets.profiling import layers_command as command
from revnets.profiling.training_flops import FlopsReport


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["layers", *arguments])
    return result.exit_code, result.output


def test_lists_the_registry() -> None:
    code, output = run()
    assert code == 0
    assert all(name in output for name in list_layers())


def test_shows_a_conversion() -> None:
    code, output = run("test_efficientnet", "sparse_doped:0.75", "--img-size", "64")
    assert code == 0
    assert "the first layer stays dense" in output
    assert "MFLOPs per image" in output


def test_writes_flops_by_layer_and_schedule(tmp_path: Path) -> None:
    code, output = run("test_resnet", "sparse_parallel:0.75", "--img-size", "64", "--output", str(tmp_path / "new"))
    assert code == 0
    assert str(tmp_path / "new" / "flops.png") in output
    with (tmp_path / "new" / "flops.csv").open() as file:
        rows = list(csv.DictReader(file))
    data = json.loads((tmp_path / "new" / "flops.json").read_text())
    assert sum(int(row["flops"]) for row in rows) == data["after"]["flops"] > 2 * data["before"]["flops"]
    assert sum(int(row["sparse_flops"]) for row in rows) == data["after"]["sparse_flops"] == data["before"]["flops"]
    assert data["training"]["dense"]["flops"] == data["training"]["static"]["flops"] == 3 * data["before"]["flops"]
    assert data["training"]["set"]["flops"] < data["training"]["rigl"]["flops"]
    assert (tmp_path / "new" / "flops.png").read_bytes().startswith(b"\x89PNG")


def test_layers_that_were_split_count_together() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    report = convert(net, "sparse_factorized:0.75", input_size=(3, 16, 16))
    groups = FlopsReport(report.after, {}, "image", report.before).groups()
    assert list(groups) == ["0", "1"]
    dense, sparse, former = groups["1"]
    assert (sparse, dense) == (former, sum(layer.flops for layer in report.after.layers if layer.name[0] == "1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet999", "sparse:0.5"], "unknown model 'resnet999'"),
        (["test_resnet"], "which layers? Give one of"),
        (["test_resnet", "sparse:2"], "sparse: sparsity=2.0: expected a number from 0"),
        (["test_resnet", "sparse:0.5", "--output", __file__], "cannot be used"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert message in output.replace("\n", " ")
    assert "Traceback" not in output


def test_unknown_weights_and_options() -> None:
    with pytest.raises(ValueError, match=r"unknown weights 'resnet18\.nonsense': expected resnet18 or resnet18"):
        command.print_conversion("resnet18.nonsense", "sparse:0.5", None)
