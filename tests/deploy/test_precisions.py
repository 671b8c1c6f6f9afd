"""Candidates of ``deploy`` below float32: what goes wrong with one of them, and on which images they are judged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revnets.deploy import ENGINES, Candidate, Engine, ExportError, Precisions, deploy
from revnets.deploy.command import Request, _judged_on_its_calibration
from revnets.deploy.precisions import _Trial
from revnets.pruning.command import Source

from .nets import Net, images


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing but torch were installed."""
    monkeypatch.setattr(Engine, "missing", lambda engine: list(engine.packages))


def tried(**options: Any) -> Precisions:
    data = images(4)
    return Precisions(100, data, [(data, torch.zeros(4, dtype=torch.long))], **options)


def trial(folder: Path, made: list[Candidate]) -> _Trial:
    return _Trial(Net(nn.ReLU), images(1), True, folder, "model", made, [images(2)], "minmax")


# --- what cannot be asked for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch", "sparse", "nothing"])
def test_precisions_are_tried_only_where_engines_are_compared(engine: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"^precisions: only with engine='auto'.*engine='{engine}'"):
        deploy(Net(), images(1), tmp_path / "out", engine, precisions=tried())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [[], [Candidate("openvino", "float32", None, refused="it has no such operator")]])
def test_an_engine_without_a_file_in_float32_has_none_by_default(made: list[Candidate], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^openvino has no file in float32$"):
        trial(tmp_path, made).by_default("openvino", "bfloat16")


# --- one candidate fails ---------------------------------------------------------------------------------------------


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the library's own words")


def fail_later(calls: int) -> Any:
    """Stands for torch.export.save: the first files can be written."""
    save, left = torch.export.save, [calls]

    def write(*arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            fail()
        save(*arguments, **options)

    return write


@pytest.mark.parametrize("what", ["calibration", "file", "first call"])
def test_a_library_that_fails_at_one_candidate_leaves_the_others(
    what: str, ours_alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, instead, message = {
        "calibration": ("revnets.deploy.int8_ranges.Observed.run_node", fail, "refuses calibration images of shape"),
        "file": ("torch.export.save", fail_later(2), "torch.export cannot write the model"),
        "first call": ("revnets.deploy.quantize.load", lambda _: fail, "the file in INT8 fails on images of shape"),
    }[what]
    if what == "first call":  # the package's name for it is a function
        monkeypatch.setattr(sys.modules["revnets.deploy.quantize"], "load", instead)
    else:
        monkeypatch.setattr(place, instead)
    made = deploy(Net(nn.ReLU), images(1), tmp_path, precisions=tried(images=4))
    assert made.precision == "float32"
    assert [one.name for one in made.candidates] == ["torch", "sparse", "sparse int8"]
    assert message in made.candidates[-1].refused
    assert "the library's own words" in made.candidates[-1].refused


def test_an_engine_that_fails_in_its_first_call_leaves_it_to_the_others(
    ours_alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_own(engine: Engine, *_: Any) -> Any:
        return fail if engine.name == "torch" else lambda x: [net(x)]

    net = Net().eval()
    monkeypatch.setattr("revnets.deploy.engines.open_own", open_own)
    made = deploy(net, images(1), tmp_path)
    assert (made.engine, len(made.candidates)) == ("sparse", 2)
    assert made.candidates[0].refused.startswith("torch fails on images of shape (1, 3, 24, 24): the library's own")


@pytest.mark.skipif(bool(ENGINES["onnxruntime"].missing()), reason="the engine is not installed")
def test_a_quantiser_that_fails_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime import quantization

    from revnets.deploy.quantize import quantize_onnx

    monkeypatch.setattr(quantization, "quantize_static", fail)
    with pytest.raises(ExportError, match=r"^ONNX Runtime cannot quantise the model: the library's own words$"):
        quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", [images(1)], "minmax")


def test_a_file_that_two_engines_run_is_tried_in_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ran in one of them: the other may fail in its first call all the same."""

    class Failing:
        def open(self, *_: Any) -> Any:
            return fail

    (tmp_path / "made").mkdir()
    path = tmp_path / "made" / "model-int8.onnx"
    path.write_bytes(b"")
    monkeypatch.setattr("revnets.deploy.precisions.get_engine", lambda name: Failing())
    twin = Candidate("onnxruntime", "int8", path, lambda x: [x])
    with pytest.raises(ExportError, match=r"^openvino int8 fails on images of shape .*own words$"):
        trial(tmp_path, [twin]).quantised("openvino", "int8")


# --- on which images -------------------------------------------------------------------------------------------------

DROP, INT8_ALONE, FLOAT32_ALONE = {"accuracy_drop": 1.0}, {"int8": True}, dict[str, Any]()


@pytest.mark.parametrize(
    ("split", "eval_split", "options", "same"),
    [
        ("train", "validation", DROP, False),
        ("train", "val", INT8_ALONE, False),
        ("", "validation", DROP, False),
        ("train", "train", DROP, True),
        ("", "train", DROP, True),
        ("validation", "val", INT8_ALONE, True),
        (".", ".", DROP, True),
        (".", "validation", DROP, True),
        ("train", ".", INT8_ALONE, True),
        ("train", "", INT8_ALONE, False),
        ("train", "train", FLOAT32_ALONE, False),
    ],
)
def test_images_that_judge_what_they_calibrated(
    split: str, eval_split: str, options: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
    source = Source("resnet18", tmp_path, tmp_path, split=split)
    assert _judged_on_its_calibration(source, Request(eval_split=eval_split, **options)) is same


def test_an_archive_has_no_other_images(tmp_path: Path) -> None:
    (tmp_path / "all.tar").touch()
    source = Source("resnet18", tmp_path / "all.tar", tmp_path, split=".")
    assert _judged_on_its_calibration(source, Request(eval_split=".", accuracy_drop=1.0))


# --- no work that decides nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "counted"), [(0.5, True), (1.0, True), (1.04, True), (1.06, False), (3.0, False)])
def test_what_is_slower_than_float32_is_not_judged(seconds: float, counted: bool) -> None:
    seen = []

    def run(x: Tensor) -> list[Tensor]:
        seen.append(len(x))
        return [x.mean((2, 3))]

    made = [
        Candidate("torch", "float32", None, run, seconds=2.0),
        Candidate("sparse", "float32", None, run, seconds=1.0),
        Candidate("sparse", "int8", None, run, seconds=seconds),
    ]
    data = [(torch.rand(3, 4, 2, 2), torch.zeros(3, dtype=torch.long))]
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    Precisions(0, [], data).judge(model, made, lambda work, what: work)
    assert seen == [3] * counted
    assert [one.accuracy is not None for one in made] == [True, True, counted]
    assert [one.refused for one in made] == ["", "", "" if counted else "it is slower than sparse in float32"]


def test_an_int8_that_failed_is_not_made_again_for_another_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revnets.deploy.precisions.quantize", fail)
    failed = Candidate("onnxruntime", "int8", None, refused="INT8 outputs differ by 0.70")
    with pytest.raises(ExportError, match=r"^as onnxruntime int8: INT8 outputs differ by 0\.70$"):
        trial(tmp_path, [failed]).quantised("openvino", "int8")
    with pytest.raises(RuntimeError, match="own words"):  # another file
        trial(tmp_path, [failed]).quantised("sparse", "int8")
