"""Files for engines: verified, complete or not there; INT8; the command; errors in one sentence."""

import csv
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from revnets.cli import app
from revnets.deploy import ENGINES, ExportError, accuracy, compare, deploy, engines, load, quantize
from revnets.deploy import command as bench_commands
from revnets.deploy.compare import Measurement, speedups
from revnets.deploy.peers import PEERS
from revnets.deploy.quantize import calibration_images
from revnets.kernels.build import COMPILER_VARIABLE, kernel_problem, load_kernel

from .nets import Net, evaluated, images

SLOW = pytest.mark.slow
INSTALLED = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(bool(e.missing()), reason=f"{', '.join(e.missing())} not installed"),
            *([SLOW] if e.packages else []),
        ],
    )
    for name, e in ENGINES.items()
]
onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxscript", "onnxruntime")),
    reason="ONNX Runtime is not installed: pip install 'revnets[deploy]'",
)


@pytest.mark.parametrize("engine", INSTALLED)
def test_round_trip(engine: str, tmp_path: Path) -> None:
    model = Net()
    made = deploy(model, images(1), tmp_path / "new" / "folder", engine, name="net", max_density=0.3)
    assert made.engine == engine
    assert made.error < 1e-5
    assert {path.stem for path in made.path.parent.iterdir()} == {"net"}, "nothing else is left behind"
    for batch in (1, 4):
        (output,) = load(made.path)(images(batch))
        torch.testing.assert_close(output, evaluated(model, images(batch)), rtol=1e-4, atol=1e-4)
    (output,) = load(made.path, threads=2)(images(2))
    torch.testing.assert_close(output, evaluated(model, images(2)), rtol=1e-4, atol=1e-4)


def test_a_fixed_batch_size(tmp_path: Path) -> None:
    made = deploy(Net(), images(1), tmp_path, "torch", any_batch=False)
    assert load(made.path)(images(1))[0].shape == (1, 4)


@SLOW
@onnx
def test_auto_takes_the_fastest(tmp_path: Path) -> None:
    made = deploy(Net(), images(1), tmp_path)
    assert made.seconds[made.engine] == min(made.seconds.values())
    assert set(made.seconds) == {e.name for e in ENGINES.values() if not e.missing()}


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt2").write_text("the former one")
    wrong = Net()
    wrong.fc.bias.data += 1
    graph = engines.export_graph(wrong, images(2))
    monkeypatch.setattr(engines, "export_graph", lambda *_: graph)
    with pytest.raises(ExportError, match=r"outputs differ.*nothing was written"):
        deploy(Net(), images(1), tmp_path, "torch")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the former one"]


def test_without_a_compiler_the_file_is_the_same(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(COMPILER_VARIABLE, "none")
        load_kernel.cache_clear()
        kernel_problem.cache_clear()
        with pytest.warns(UserWarning, match=r"dense kernels"):
            made = deploy(Net(), images(1), tmp_path, "sparse")
    load_kernel.cache_clear()
    kernel_problem.cache_clear()
    assert sum(layer.choice == "sparse" for layer in made.layers) == 5
    torch.testing.assert_close(load(made.path)(images(2))[0], evaluated(Net(), images(2)), rtol=1e-5, atol=1e-5)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"unknown engine 'tensorrt': expected auto or one of torch, onnxruntime"):
        deploy(Net(), images(1), tmp_path, "tensorrt")
    with pytest.raises(ExportError, match=r"there is no file"):
        load(tmp_path / "missing.onnx")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"cannot be used"):
        deploy(Net(), images(1), tmp_path / "file", "torch")
    with pytest.raises(ExportError, match=r"expected a name that ends in .pt2, .onnx, .xml"):
        load(tmp_path / "file")
    (tmp_path / "broken.pt2").write_text("nothing")
    with pytest.raises(ExportError, match=r"no seal of revnets deploy.*trust=True"):
        load(tmp_path / "broken.pt2")
    with pytest.raises(ExportError, match=r"torch.export cannot open"):
        load(tmp_path / "broken.pt2", trust=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ExportError, match=r"engine openvino: .*openvino not installed: pip install"):
        deploy(Net(), images(1), tmp_path, "openvino")


# --- INT8 ------------------------------------------------------------------------------------------------------------


@onnx
def test_quantize(tmp_path: Path) -> None:
    model = Net(nn.ReLU)
    made = quantize(model, images(24), tmp_path, images=16)
    assert made.error < 0.2
    assert made.weights >= 16 * 32 * 4 + 16 * 32 * 9
    assert made.zeros / made.weights > 0.7
    outputs = load(made.path)(images(24))[0]
    error = (outputs - evaluated(model, images(24))).square().mean().sqrt() / evaluated(model, images(24)).std()
    assert float(error) < 0.3
    labels = evaluated(model, images(24)).argmax(1)
    assert accuracy(load(made.path), [(images(24), labels)]) > 70
    assert [path.name for path in tmp_path.iterdir()] == ["model-int8.onnx"]


@onnx
@pytest.mark.parametrize("images", [1, 7, 8, 9, 20, 30])
@pytest.mark.parametrize("sizes", [(30,), (8, 8, 8, 6), (1, 11, 12, 6)])
def test_as_many_images_as_asked_for_calibrate(images: int, sizes: tuple[int, ...]) -> None:
    data = torch.arange(30.0)[:, None, None, None].expand(30, 1, 2, 2)
    found = list(calibration_images([(batch, None) for batch in data.split(list(sizes))], images))
    assert torch.equal(torch.cat(found), data[:images])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.empty(0, 3, 24, 24), "no calibration images"),
        ([], "no calibration images"),
        (torch.full((2, 3, 24, 24), float("nan")), "NaN or infinity"),
        (torch.zeros(2, 24), "expected float tensors of shape"),
        (torch.zeros(2, 5, 24, 24), "the model refuses calibration images of shape"),
    ],
)
def test_calibration_data_that_does_not_fit(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        quantize(Net(), data, tmp_path)
    assert not list(tmp_path.iterdir())


@SLOW
@onnx
def test_too_large_an_error_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"INT8 outputs differ.*nothing was written"):
        quantize(Net(nn.ReLU), images(8), tmp_path, max_error=1e-6)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"calibration='best'"):
        quantize(Net(), images(8), tmp_path, calibration="best")


# --- the comparison --------------------------------------------------------------------------------------------------


def test_speedups_are_against_the_fastest_dense_engine() -> None:
    rows = [
        Measurement("net", 0.0, "a", 1, 4.0, 4.0),
        Measurement("net", 0.0, "b", 1, 2.0, 3.0),
        Measurement("net", 0.0, "sparse", 1, 1.0, 1.0),
        Measurement("net", 0.9, "sparse", 1, 0.5, 1.0),
        Measurement("net", 0.9, "b", 1, 2.0, 3.0),
    ]
    assert [ratio for _, ratio in speedups(rows)] == [0.5, 1.0, 2.0, 4.0, 1.0]
    assert [ratio for _, ratio in speedups(rows, cpu=True)] == [0.75, 1.0, 3.0, 3.0, 1.0]


def test_speedups_by_class_of_accuracy() -> None:
    rows = [
        Measurement("net", 0.0, "a", 1, 8.0, 8.0),
        Measurement("net", 0.0, "a default", 1, 4.0, 4.0, precision="bfloat16"),
        Measurement("net", 0.0, "a int8", 1, 2.0, 2.0, precision="int8"),
        Measurement("net", 0.9, "sparse", 1, 4.0, 4.0),
        Measurement("net", 0.9, "sparse int8", 1, 1.0, 1.0, precision="int8"),
    ]
    assert [ratio for _, ratio in speedups(rows)] == [1.0, 0.5, 1.0, 2.0, 2.0]
    assert [ratio for _, ratio in speedups(rows, any_precision=True)] == [0.25, 0.5, 1.0, 0.5, 2.0]
    only = [m for m in rows if m.precision == "int8"]
    assert [ratio for _, ratio in speedups(only)] == [1.0, 2.0]
    larger = [dataclasses.replace(m, batch_size=64, seconds=10 * m.seconds) for m in rows]
    assert [ratio for _, ratio in speedups([*rows, *larger])] == [*([1.0, 0.5, 1.0, 2.0, 2.0] * 2)]


def test_compare_at_other_precisions() -> None:
    """INT8 of every engine that is installed, and what OpenVINO takes by itself."""
    names = [name for name, peer in PEERS.items() if not peer.missing()]
    if kernel_problem() is not None:
        names.remove("sparse int8")
    net = Net(nn.ReLU)
    found = compare({0.0: net}, images(1), names, repeats=1, name="net")
    assert [m.engine for m in found] == names
    assert [m.precision for m in found] == [PEERS[name].used() for name in names]
    assert all(m.kernels for m in found if not m.engine.startswith("onnxruntime"))
    assert all(1e-6 < m.error < 0.3 for m in found if m.precision == "int8")


@pytest.mark.parametrize("name", ["torch int8", "onnxruntime default", "sparse int4", "int8"])
def test_engines_at_precisions_that_there_are_not(name: str) -> None:
    with pytest.raises(ExportError, match=f"unknown engine '{name}': expected "):
        compare({0.0: Net()}, images(1), [name])


def test_compare() -> None:
    dense = Net()
    rows = compare({0.0: dense, 0.9: Net()}, images(1), ["torch eager", "sparse"], (1, 2), repeats=2, name="net")
    assert [(m.sparsity, m.engine, m.threads) for m in rows] == [
        (s, e, t) for t in (1, 2) for s in (0.0, 0.9) for e in ("torch eager", "sparse")
    ]
    assert all(m.seconds > 0 and m.error < 1e-4 for m in rows)
    with pytest.raises(ExportError, match=r"unknown engine"):
        compare({0.0: dense}, images(1), ["nonsense"])


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("test_efficientnet", num_classes=4)
    for parameter in model.parameters():
        if parameter.dim() == 4 and parameter.shape[1] > 8:
            parameter.data *= torch.rand_like(parameter) < 0.1
    path = tmp_path_factory.mktemp("weights") / "pruned.safetensors"
    save_file(model.state_dict(), path)
    return path


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


SMALL = ("--model-kwargs", "num_classes=4", "--img-size", 64)


def test_deploy_command(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("deploy", "test_efficientnet", "--checkpoint", checkpoint, *SMALL, "--output", tmp_path)
    result = command(*arguments, "--engine", "sparse", "--max-density", 0.2)
    assert result.exit_code == 0, result.output
    assert "exploits any zeros" in result.output
    assert load(tmp_path / "test_efficientnet.pt2")(images(2, 64))[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "nonsense"), "unknown engine 'nonsense'"),
        (("--int8",), "need images: give --data"),
        (("--int8", "--data", ".", "--engine", "torch"), "runs no INT8"),
        (("--tolerance", 0), "expected a number above 0"),
        (("--checkpoint", "/nonexistent.safetensors"), "there is no file"),
        (("--engine", "torch", "--output", "/proc/nothing"), "cannot be used"),
    ],
)
def test_errors_are_one_sentence(arguments: tuple[Any, ...], message: str, checkpoint: Path, tmp_path: Path) -> None:
    usual = (("--checkpoint", checkpoint), ("--output", tmp_path))
    given = (each for pair in usual if pair[0] not in arguments for each in pair)
    result = command("deploy", "test_efficientnet", *SMALL, *given, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_leaves_no_folder(tmp_path: Path) -> None:
    result = command("deploy", "nope", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "unknown model 'nope'" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sparsity", "a", "--sparsity 'a': 'a': expected a number of at least 0 and below 1, such as 0.75"),
        ("--sparsity", ",", "--sparsity ',': an item is empty"),
        ("--threads", "1.5", "--threads '1.5': '1.5': expected a whole number of at least 1"),
        ("--threads", "0", "--threads '0': '0': expected a whole number of at least 1"),
    ],
)
def test_lists_that_are_no_numbers(option: str, value: str, message: str) -> None:
    result = command("bench-deploy", "test_vit", option, value)
    assert result.exit_code == 2
    assert message in result.output


@SLOW
@onnx
def test_int8_command(checkpoint: Path, tmp_path: Path) -> None:
    from PIL import Image

    for label in "ab":
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (64, 64), (40 * i, 100, 30)).save(tmp_path / "data" / "train" / label / f"{i}.png")
    arguments = ("deploy", "test_efficientnet", "--checkpoint", checkpoint, *SMALL, "--output", tmp_path / "out")
    result = command(*arguments, "--int8", "--data", tmp_path / "data", "--images", 8, "--eval-split", "train")
    assert result.exit_code == 0, result.output
    assert "INT8 weights" in result.output
    assert "Top-1 on train" in result.output


def test_bench_command(tmp_path: Path) -> None:
    arguments = ("--sparsity", "0,0.9", "--engines", "torch eager,sparse", "--img-size", 64, "--repeats", 1)
    arguments += ("--batch-size", "1,3")
    result = command("bench-deploy", "test_efficientnet", *arguments, "--no-layers", "--by-layer", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "deploy.json").read_text())["networks"]
    assert [(r["batch_size"], r["engine"], r["sparsity"]) for r in rows] == [
        (b, e, s) for b in (1, 3) for s in (0, 0.9) for e in ("torch eager", "sparse")
    ]
    assert all(r["kernels"] for r in rows), "torch and our kernel tell what they use"
    assert "class of accuracy" in result.output
    with (tmp_path / "layers.csv").open() as file:
        parts = list(csv.DictReader(file))
    cases = {(r["case"], float(r["sparsity"]), r["engine"]) for r in parts}
    assert cases == {(f"test_efficientnet, batch {b}", s, "sparse") for b in (1, 3) for s in (0, 0.9)}
    assert any(r["kind"] == "depthwise 3x3 / 2" and float(r["seconds"]) > 0 for r in parts)
    for wrong in (
        ("--sparsity", "1"),
        ("--threads", "x"),
        ("--engines", "nonsense"),
        ("--batch-size", "0"),
        ("--by-layer", "--engines", "torch eager"),
    ):
        assert command("bench-deploy", "test_efficientnet", *wrong).exit_code == 2
    assert command("bench-deploy", "nonsense").exit_code == 2


def test_layers_are_not_timed_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_commands, "kernel_problem", lambda: "there is no compiler")
    result = command("bench-deploy", "test_efficientnet", "--by-layer", "--engines", "torch eager,sparse")
    assert result.exit_code == 2
    assert "there is no compiler; give --engines openvino" in " ".join(result.output.split())


def test_signals_are_survived_after_openvino(tmp_path: Path) -> None:
    """Its plug-in changes the stack of signals: of two models that go, the second left one that was unmapped."""
    if ENGINES["openvino"].missing():
        pytest.skip("openvino is not installed")
    path = deploy(Net(), images(1), tmp_path, "openvino").path
    torch.save(images(1), tmp_path / "x.pt")
    code = f"""
import gc, os, signal, torch
from revnets.deploy import load
from revnets.deploy.peers import default_precision
signal.signal(signal.SIGTERM, lambda *_: print("told"))
first, second = load({str(path)!r}), load({str(path)!r})
x = torch.load({str(tmp_path / "x.pt")!r})
first(x), second(x), default_precision()
for name in ("first", "second"):
    del globals()[name]
    gc.collect()
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr[-2000:]
