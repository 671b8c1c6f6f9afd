"""``revnets prune``: from a checkpoint and a folder of images to weights that plain timm loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from revnets.cli import app
from revnets.layers import convert
from revnets.models.small_stem import small_stem


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, and a checkpoint as train.py writes them, of sparse layers."""
    root = tmp_path_factory.mktemp("pruning")
    generator = torch.Generator().manual_seed(0)
    for kind in ("a", "b"):
        (root / "data" / "train" / kind).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "data" / "train" / kind / f"{i}.png")
    torch.manual_seed(0)
    model = convert(timm.create_model("test_resnet", num_classes=2), "sparse:0.5", input_size=(3, 32, 32)).model
    args = {"model": "test_resnet", "num_classes": 2, "img_size": 32, "mean": [0.5] * 3, "layers": "sparse:0.5"}
    torch.save({"state_dict": model.state_dict(), "args": args}, root / "sparse.pth.tar")
    return root


def prune(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def test_from_a_checkpoint_to_plain_weights(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned.safetensors"
    line = ("test_resnet", "--checkpoint", folder / "sparse.pth.tar", "--data", folder / "data", "--images", "10")
    result = prune(*line, "--sparsity", "0.7", "--output", output, "--max-passes", "3")
    assert result.exit_code == 0, result.output
    assert "of sparsity 0.7000" in " ".join(result.output.split())
    model = timm.create_model("test_resnet", num_classes=2, checkpoint_path=str(output))
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["images"] == 10
    for layer in report["layers"]:
        assert int((model.get_submodule(layer["name"]).weight == 0).sum()) == layer["zeros"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".png", ".safetensors"]
    with safe_open(output, "pt") as file:
        stored = json.loads(file.metadata()["args"])
    assert (stored["model"], stored["num_classes"], stored["img_size"]) == ("test_resnet", 2, 32)
    again = tmp_path / "again.safetensors"  # what the file knows of its model is enough to go on from it
    result = prune("test_resnet", "--checkpoint", output, *line[3:], "--pattern", "1:4", "--output", again)
    assert result.exit_code == 0, result.output
    assert json.loads(again.with_suffix(".json").read_text())["sparsity"] >= 0.75


def test_network_with_a_small_stem(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=2, channels=[8, 8, 8, 8], stem_width=8)
    small_stem(model, 2)
    args = {"model": "resnet18", "model_kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}, "small_stem": 2}
    torch.save(
        {"state_dict": model.state_dict(), "args": {**args, "num_classes": 2, "img_size": 32}}, tmp_path / "a.pth"
    )
    output, data = tmp_path / "pruned.safetensors", folder / "data"
    for checkpoint in (tmp_path / "a.pth", output):
        line = ("resnet18", "--checkpoint", checkpoint, "--data", data, "--sparsity", "0.5", "--output", output)
        result = prune(*line, "--method", "magnitude", "--max-passes", "1")
        assert result.exit_code == 0, result.output
    model.load_state_dict(load_file(output))
    assert model.conv1.stride == (2, 2)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": "test_resnets"}, "unknown model 'test_resnets': did you mean"),
        ({"model": "test_vit"}, "the checkpoint is of test_resnet, not of test_vit"),
        ({"--checkpoint": "missing.pth.tar"}, "there is no file 'missing.pth.tar'"),
        ({"--data": "/nowhere"}, "there is no folder or .tar file '/nowhere'"),
        ({"--split": "nowhere"}, "there is no 'nowhere' in"),
        ({"--sparsity": "1.5"}, "sparsity=1.5"),
        ({"--pattern": "2:4"}, "expected one of the two"),
        ({"--method": "obd"}, "method='obd'"),
        ({"--exclude": "nothing.*"}, "exclude='nothing.*'"),
        ({"--output": "weights.pth"}, "ends in .safetensors"),
        ({"--output": "/nowhere/weights.safetensors"}, "the folder '/nowhere'"),
        ({"--model-kwargs": "nonsense=3"}, "test_resnet cannot be made"),
        ({"--model-kwargs": "stem_width"}, "expected KEY=VALUE"),
        ({"--model-kwargs": "stem_width=7"}, "is not of test_resnet with these arguments"),
        ({"--device": "abacus"}, "device 'abacus'"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    folder: Path, tmp_path: Path, more: dict[str, str], words: str
) -> None:
    options = {"--checkpoint": str(folder / "sparse.pth.tar"), "--data": str(folder / "data"), "--sparsity": "0.5"}
    options |= {"--output": str(tmp_path / "out.safetensors"), **more}
    model = options.pop("model", "test_resnet")
    result = prune(model, *(word for pair in options.items() for word in pair))
    assert result.exit_code == 2, result.output
    message = result.stderr.strip().splitlines()
    assert len(message) == 1, message
    assert words in message[0], message
    assert not list(tmp_path.iterdir())
