"""``revnets numerics``: table, files, data of random numbers and of images, and one sentence for what cannot be."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from revnets.cli import app

pytestmark = pytest.mark.filterwarnings("ignore:FP8 is emulated")


def numerics(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["numerics", *arguments])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for index in range(12):
        path = folder / "train" / ("cat", "dog", "owl")[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    with tarfile.open(folder / "all.tar", "w") as tar:
        for path in sorted(folder.glob("train/*/*.png")):
            tar.add(path, f"{path.parent.name}/{path.name}")
    return folder


def test_random_data_is_said(tmp_path: Path) -> None:
    result = numerics("test_efficientnet@32:4", "--batches", "1", "--layers", "mus_fp8", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "RANDOM numbers" in result.output
    assert "FP8 products: " in result.output
    assert "emulate" in result.output
    rows = json.loads((tmp_path / "numerics.json").read_text())["rows"]
    with (tmp_path / "numerics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [r["layer"] for r in rows] == [r["layer"] for r in table]
    assert {r["kind"] for r in rows} == {"MuSConv2d", "MuSLinear"}
    assert all(0 <= r["output_grad_flushed"] <= 1 and r["input_rms"] > 0 for r in rows)
    assert (tmp_path / "numerics.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["", "all.tar"])
def test_images(images: Path, where: str, tmp_path: Path) -> None:
    arguments = ("test_resnet@32:4", "--batches", "5", "--mode", "store", "--output", str(tmp_path))
    result = numerics(*arguments, "--data", str(images / where))
    assert result.exit_code == 0, result.output
    assert "3 batches of" in result.output  # as many as there are
    assert "FP8 products: none" in result.output
    rows = json.loads((tmp_path / "numerics.json").read_text())["rows"]
    assert not any(r["fp8"] for r in rows)


WRONG = {
    "a model that nobody knows": (["no_such_net"], "unknown model 'no_such_net'"),
    "data that is not there": (["test_vit", "--data", "/no/where"], "there is no folder or .tar file '/no/where'"),
    "a folder without images": (["test_vit", "--data", "/proc/self/fdinfo"], "cannot open images in"),
    "layers that nobody knows": (["test_resnet@32:2", "--layers", "fp9"], "unknown layer 'fp9'"),
    "a size that does not divide": (["test_revbifpn@33:2"], "must be divisible by 16"),
    "a device that is not here": (["test_resnet@32:2", "--device", "mps"], "test_resnet @32 batch 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_sentence(case: str) -> None:
    arguments, expected = WRONG[case]
    result = numerics(*arguments)
    assert result.exit_code == 2, result.output
    assert expected in result.output
    assert result.output.strip().startswith("revnets: ")
    assert "\n" not in result.output.strip()


def test_too_few_images(images: Path) -> None:
    result = numerics("test_resnet@32:40", "--data", str(images))
    assert result.exit_code == 2
    assert "12 images do not fill one batch of 40" in result.output
