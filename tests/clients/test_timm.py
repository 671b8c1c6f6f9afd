"""timm's own tests of models and its scripts on our networks, from paths that the user gives; its ONNX export.

`TIMM_TESTS=.../tests/test_models.py TIMM_SCRIPTS=...` (the folder of `train.py`), as docs/clients.md says.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.utils.onnx import onnx_export, onnx_forward

from tests.clients import timm_models
from tests.clients.steps import client
from tests.models.registry import make, relative, with_statistics

ROOT = Path(__file__).resolve().parents[2]
TESTS, SCRIPTS = os.environ.get("TIMM_TESTS"), os.environ.get("TIMM_SCRIPTS")
NO_TESTS = "timm's tests/test_models.py is not in its wheel: TIMM_TESTS=PATH says where it is"
NO_SCRIPTS = "timm's scripts are not in its wheel: TIMM_SCRIPTS=FOLDER says where they are"
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
CLASSES = ("blue", "green", "red", "white", "black")
ON_CPU = ("--device", "cpu", "-j", "0", "-b", "4")

# --- its tests -------------------------------------------------------------------------------------------------------

IN_ITS_STYLE = """
import pytest
from timm import create_model, list_models

@pytest.mark.base
@pytest.mark.parametrize("model_name", list_models(exclude_filters=["vit_*"]))
@pytest.mark.parametrize("batch_size", [1])
def test_model_forward(model_name, batch_size):
    create_model(model_name, device="meta")

@pytest.mark.parametrize("model_name", list_models(filter=["vit_*"], module=["vision_transformer"]))
def test_model_default_cfgs_non_std(model_name):
    assert "mus_vit" in model_name

@pytest.mark.parametrize("model_name", list_models(exclude_filters=["*enormous*"]))
def test_model_forward_torchscript(model_name):
    assert False

@pytest.mark.parametrize("model_name", ["test_resnet", "densenet121"])
def test_reset_classifier_keeps_pool(model_name):
    assert model_name == "test_revbifpn"

def test_gcvit_batch_consistency():
    assert False
"""


def test_its_lists_of_models_become_ours(tmp_path: Path) -> None:
    file = tmp_path / "tests" / "test_models.py"
    file.parent.mkdir()
    file.write_text(IN_ITS_STYLE)
    for beside in ("__init__.py", "conftest.py"):  # as in timm's source distribution
        (file.parent / beside).touch()
    command = [
        sys.executable,
        "-m",
        "tests.clients.timm_models",
        str(file),
        "--models",
        "test_revbifpn",
        "test_mus_vit",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+ \| \d+)", done.stdout, re.MULTILINE))
    assert rows == {
        "test_model_forward": "1 | 0",
        "test_model_default_cfgs_non_std": "1 | 0",
        "test_model_forward_torchscript": "0 | 2",
        "test_reset_classifier_keeps_pool": "1 | 0",
    }
    assert "left out: 1" in done.stdout


@pytest.mark.skipif(TESTS is None, reason=NO_TESTS)
def test_its_own_tests_of_models() -> None:
    code, plugin = timm_models.run(Path(str(TESTS)))
    assert code == 0, plugin.table()
    assert sum(counts["passed"] for counts in plugin.outcomes.values()) > 50, plugin.table()


# --- its scripts -----------------------------------------------------------------------------------------------------


def the_line(script: Path, *arguments: str) -> list[str]:
    """The command of docs/clients.md for scripts that import nothing for their users."""
    (line,) = re.findall(r'^python -c "(.*)" ', PAGE, re.MULTILINE)
    return [sys.executable, "-c", line.replace("pytorch-image-models/validate.py", str(script)), *arguments]


def run(command: list[str], folder: Path) -> str:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    surroundings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_line_makes_our_names_known_to_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\n"
        "if __name__ == '__main__':\n"
        "    print(timm.create_model(sys.argv[2], device='meta').num_features, sys.argv[1:])\n"
    )
    said = run(the_line(script, "--model", "test_revbifpn"), tmp_path)
    assert said.split(maxsplit=1) == ["416", "['--model', 'test_revbifpn']\n"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "validation"):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for k in range(2):
                Image.new("RGB", (64, 64), name).save(folder / split / name / f"{name}{k}.png")
    return folder


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of `train.py`, which imports what `--device-modules` names."""
    folder = tmp_path_factory.mktemp("trained")
    train(images, folder, "test_revbifpn", "--model-ema")
    return folder / "run" / "last.pth.tar"


def train(images: Path, folder: Path, model: str, *options: str) -> None:
    command = [sys.executable, str(Path(str(SCRIPTS)) / "train.py"), "--device-modules", "revnets", "--model", model]
    command += ["--data-dir", str(images), "--num-classes", "5", *ON_CPU, "--epochs", "1", "--warmup-epochs", "0"]
    run([*command, "--lr", "0.01", "--output", str(folder), "--experiment", "run", *options], folder)
    assert (folder / "run" / "summary.csv").read_text().count("\n") == 2


@pytest.mark.skipif(SCRIPTS is None, reason=NO_SCRIPTS)
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("test_rev_mus_vit", "--layer-decay 0.7 --clip-grad 1 --opt adamw --grad-accum-steps 2 --mixup 0.2"),
        ("test_revbifpn", "--amp --amp-dtype bfloat16 --channels-last --grad-checkpointing"),
        ("test_revbifpn", "--model-dtype bfloat16 --model-kwargs exact=False"),
        ("test_revbifpn", "--split-bn --aug-splits 2 --jsd-loss"),
        ("revbifpn_s0", "--img-size 64 --drop-path 0.1"),
    ],
)
def test_train(images: Path, tmp_path: Path, model: str, options: str) -> None:
    train(images, tmp_path, model, *options.split())


@pytest.mark.skipif(SCRIPTS is None, reason=NO_SCRIPTS)
class TestScripts:
    """Each on what `train.py` has left."""

    def script(self, name: str, trained: Path, folder: Path, *arguments: str) -> str:
        file, mine = Path(str(SCRIPTS)) / f"{name}.py", ["--model", "test_revbifpn"]
        if name != "benchmark":
            mine += ["--num-classes", "5", "--checkpoint", str(trained)]
        return run(the_line(file, *arguments, *mine), folder)

    @pytest.mark.parametrize("options", [(), ("--use-ema", "--channels-last", "--test-pool")])
    def test_validate(self, images: Path, trained: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
        said = self.script("validate", trained, tmp_path, str(images), *ON_CPU, *options)
        assert json.loads(said.split("--result")[1])["param_count"] == 0.13

    def test_inference(self, images: Path, trained: Path, tmp_path: Path) -> None:
        client("pandas")
        arguments = [str(images / "validation"), "--split", "", *ON_CPU, "--label-type", "none", "--include-index"]
        said = self.script("inference", trained, tmp_path, *arguments)
        assert len(json.loads(said.split("--result")[1])) == 2 * len(CLASSES)

    def test_benchmark(self, trained: Path, tmp_path: Path) -> None:
        arguments = ["--device", "cpu", "-b", "2", "--num-warm-iter", "1", "--num-bench-iter", "5"]
        said = json.loads(self.script("benchmark", trained, tmp_path, *arguments).split("--result")[1])
        assert said["train_samples_per_sec"] > 0
        assert said["infer_samples_per_sec"] > 0

    def test_onnx_export(self, trained: Path, tmp_path: Path) -> None:
        arguments = [str(tmp_path / "net.onnx"), "--img-size", "64", "--dynamic-size", "--check-forward"]
        self.script("onnx_export", trained, tmp_path, *arguments)
        assert (tmp_path / "net.onnx").stat().st_size > 0


# --- its export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_its_onnx_export_has_free_sides_and_batches(tmp_path: Path, use_dynamo: bool) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs it: pip install 'revnets[dev]'")
    pytest.importorskip("onnxruntime", reason="to check the exported file: pip install 'revnets[dev]'")
    model, file = with_statistics(make("test_revbifpn", num_classes=5)), str(tmp_path / "net.onnx")
    onnx_export(model, file, batch_size=2, input_size=(3, 64, 80), dynamic_size=True, use_dynamo=use_dynamo)
    x = torch.randn(3, 3, 48, 96)
    with torch.no_grad():
        assert relative(torch.from_numpy(onnx_forward(file, x)), model(x)) < 1e-4
