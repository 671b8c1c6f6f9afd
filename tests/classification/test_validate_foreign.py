"""What a checkpoint says of its training reaches no network and no file: only what the user names does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from classification import validate
from classification.networks import distill
from classification.options import TrainOptions, as_dict
from revnets.training.checkpoints.foreign import reaching_argument, reaching_name
from revnets.training.errors import UserError
from revnets.training.options.parsing import parse

from .short_runs import TINY


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What timm was asked for."""
    asked: list[tuple[Any, dict[str, Any]]] = []
    plain = timm.create_model

    def create(name: str, **arguments: Any) -> Any:
        asked.append((name, arguments))
        return plain(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create)
    return asked


def checkpoint(digits: Path, tmp_path: Path, **said: Any) -> str:
    options = parse(TrainOptions, [*TINY, "--model", "test_resnet", "--data-dir", str(digits)], "")
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    torch.save({"state_dict": weights, "args": {**as_dict(options), "num_classes": 10, **said}}, tmp_path / "a.pth")
    return str(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ({"model": "hf-hub:someone/net"}, "--model"),
        ({"model": "hf_hub:someone/net"}, "--model"),
        ({"model": "HF-HUB:someone/net"}, "--model"),
        ({"model": "local-dir:/etc"}, "--model"),
        ({"model": "https://example.invalid/net"}, "--model"),
        ({"model_kwargs": {"checkpoint_path": "/etc/passwd"}}, "--model-kwargs"),
        ({"model_kwargs": {"pretrained_cfg": {"url": "https://example.invalid/x"}}}, "--model-kwargs"),
        ({"model_kwargs": {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}}, "--model-kwargs"),
        ({"model_kwargs": {"pretrained": True}}, "--model-kwargs"),
        ({"model_kwargs": {"cache_dir": "/tmp"}}, "--model-kwargs"),
        ({"model_kwargs": {"block": {"weights": "https://example.invalid/x"}}}, "--model-kwargs"),
        ({"model_kwargs": {"stem": ["hf-hub:someone/net"]}}, "--model-kwargs"),
        ({"class_map": "/etc/passwd"}, "--class-map"),
        ({"val_split": "../../somewhere"}, "--val-split"),
        ({"val_split": "/etc"}, "--val-split"),
        ({"val_split": "pipe:touch x"}, "--val-split"),
    ],
)
def test_it_is_asked_first(
    said: dict[str, Any], option: str, digits: Path, tmp_path: Path, made: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(digits, tmp_path, **said)
    made.clear()
    assert validate.main(["--checkpoint", path, "--data-dir", str(digits)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"give {option} yourself if you trust it" in line
    assert not made


@pytest.mark.parametrize(
    ("said", "option"),
    [({}, "--data-dir"), ({"dataset": "hfds/x"}, "--dataset"), ({"dataset": "torch/x"}, "--dataset")],
)
def test_images_are_named_by_the_user(
    said: dict[str, Any], option: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate.main(["--checkpoint", checkpoint(digits, tmp_path, **said)]) == 2
    assert f"give {option} yourself" in capsys.readouterr().err


def test_a_data_set_that_downloads_is_not_taken_over(digits: Path, tmp_path: Path) -> None:
    path = checkpoint(digits, tmp_path, dataset="hfds/someone/x", dataset_download=True)
    assert validate.validate(["--checkpoint", path, "--data-dir", str(digits)])["images"] == 64


def test_what_the_user_names_is_allowed(digits: Path, tmp_path: Path, made: list[Any]) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    said = {"model_kwargs": {"checkpoint_path": "/etc/passwd"}, "class_map": "/etc/passwd"}
    line = ["--checkpoint", checkpoint(digits, tmp_path, **said), "--data-dir", str(digits)]
    (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(10)))
    line += ["--class-map", str(tmp_path / "classes.txt"), "--model-kwargs", "checkpoint_path="]
    assert validate.validate(line)["images"] == 64
    assert made[-1][1]["checkpoint_path"] == ""


@pytest.mark.parametrize("said", [{"model": "hf-hub:someone/net"}, {"model_kwargs": {"pretrained_cfg": {"url": "x"}}}])
def test_a_teacher_reaches_nothing_either(said: dict[str, Any], digits: Path, tmp_path: Path, made: list[Any]) -> None:
    path = checkpoint(digits, tmp_path, **said)
    line = [*TINY, "--model", "test_resnet", "--data-dir", str(digits), "--teacher-checkpoint", path]
    options = parse(TrainOptions, line, "")
    made.clear()
    with pytest.raises(UserError, match=r"--teacher-checkpoint: .* only what you name is read or fetched"):
        distill._as_trained(options, torch.load(path, weights_only=True))
    assert not made


def test_names_of_timm_reach_nothing() -> None:
    assert not [name for name in [*timm.list_models(), *timm.list_pretrained()] if reaching_name(name)]
    plain = {
        "drop_path_rate": 0.1,
        "drop_path": 0.2,
        "layers": "sparse:0.75",
        "pretrained": False,
        "img_size": [32, 32],
    }
    assert reaching_argument({**plain, "mode": "reversible", "act_layer": None, "cfg": {"type": "mus"}}) == ""
    assert reaching_argument(None) == reaching_argument(3) == ""
