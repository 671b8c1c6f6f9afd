"""Importing is cheap and harmless; examples in docstrings run."""

import doctest
import importlib
import pkgutil
import statistics
import subprocess
import sys

import pytest
import torch

import revnets

MODULES = [m.name for m in pkgutil.walk_packages(revnets.__path__, "revnets.")]


def test_import_brings_nothing_heavy() -> None:
    code = (
        "import timm, sys; before = set(sys.modules); import revnets; import torch;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "heavy = new & {'mmdet', 'mmcv', 'mmengine', 'sklearn', 'matplotlib', 'torchao', 'onnx', 'typer', 'rich'};"
        "assert not heavy, heavy; assert not torch.cuda.is_initialized();"
        "assert timm.is_model('revbifpn_s0')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_import_time_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import timm, time; t = time.perf_counter(); import revnets; print(time.perf_counter() - t)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    with capsys.disabled():
        print(f"\n  import revnets adds {statistics.median(times):.3f} s to import timm")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name.startswith("revnets.mm"):
        pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    if name.endswith("_triton"):
        pytest.importorskip("triton", reason="Triton is not installed: it comes with torch's builds for GPUs")
    module = importlib.import_module(name)
    torch.manual_seed(0)
    names = {"torch": torch, "nn": torch.nn, "Tensor": torch.Tensor}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0
