"""The examples run, as they stand in the documentation, on data made here."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module; nothing in it runs on import."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    """Red and blue images, four of each to train on, two held out."""
    for split, count in (("train", 4), ("validation", 2)):
        for name, colour in (("blue", (20, 20, 200)), ("red", (200, 20, 20))):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), tuple(c + i for c in colour)).save(folder / f"{i}.png")
    return tmp_path


def test_finetune(two_classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    line = [str(two_classes), "--model", "test_revbifpn", "--img-size", "32", "--epochs", "2", "--batch-size", "4"]
    accuracy = example("finetune").main(line)
    words = capsys.readouterr().out.splitlines()
    assert [w.split(":")[0] for w in words] == ["epoch 0", "epoch 1"]
    assert words[-1].endswith(f"{accuracy:.1f}% of 4 images right")


def test_detector_step(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    losses = example("detector_step").main([])
    assert {"loss", "loss_cls", "loss_bbox"} <= set(losses)
    assert all(map(math.isfinite, losses.values()))
    assert "tensors of the reversible backbone" in capsys.readouterr().out


def test_fit_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    batches = example("fit_a_card").main(["test_resnet@64", "30MB", "--device", "cpu"])
    assert batches["plain"] >= 4
    assert f"plain: batch {batches['plain']}, 0.03 of 0.03 GB" in capsys.readouterr().out


def test_fit_a_card_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(example("fit_a_card").main(["test_resnet@64", "1MB", "--device", "cpu"]).values()) == {0}
    assert "not even batch 1 fits" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_examples_say_how_they_are_run(path: Path) -> None:
    if path.stem == "retinanet_revbifpn":
        return  # a config
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]
