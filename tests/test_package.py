"""Importing is cheap and harmless; examples in docstrings run."""

import doctest
import importlib
import pkgutil
import statistics
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    "code",
    [
        "import timm; import revnets",
        "import revnets; assert not {'torch', 'timm'} & set(sys.modules)\n"
        "import importlib.util; assert importlib.util.find_spec('timm'); import timm",  # asked after, then imported
        "import revnets.layers.sparse_ift.sparse, timm",  # asks for timm when half of it is there
    ],
)
def test_networks_register_whichever_is_imported_first(code: str) -> None:
    after = (
        "assert timm.is_model('revbifpn_s0') and timm.is_model('mus_vit_tiny_patch16_224'), 'not registered'\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith('revnets')]\n"
        "assert type(timm.__spec__.loader) is type(timm.layers.__spec__.loader) is type(timm.__loader__)"
    )
    subprocess.run([sys.executable, "-c", f"import sys; {code}\n{after}"], check=True)


def test_a_timm_that_cannot_be_imported_says_so_each_time(tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text("raise ImportError('broken')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import revnets\n"
        "for _ in range(2):\n"
        "    try: import timm\n"
        "    except ImportError as error: assert str(error) == 'broken'\n"
        "    else: raise SystemExit('imported')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_loaded_when_they_are_asked_for() -> None:
    assert all(getattr(revnets, name) is not None for name in revnets.__all__)
    assert set(revnets.__all__) <= set(dir(revnets))
    assert revnets.layers.convert is revnets.convert
    with pytest.raises(AttributeError, match="'revnets' has no attribute 'converted'"):
        revnets.converted  # noqa: B018


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
