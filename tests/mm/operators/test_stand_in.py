"""Where ``mmcv.ops`` finds the operators, and what it says of those that are missing."""

import importlib.machinery
import sys

import pytest
import torch

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
operators = pytest.importorskip("revnets.mm.operators", reason=REASON, exc_type=ImportError)


def test_other_operators_say_what_is_missing() -> None:
    if not operators.install():
        pytest.skip("a compiled mmcv is installed")
    from mmcv.ops import nms_rotated

    with pytest.raises(operators.MissingOperatorError, match=r"mmcv operator 'nms_rotated' needs mmcv's compiled"):
        nms_rotated(torch.rand(3, 5), torch.rand(3), 0.5)
    with pytest.raises(operators.MissingOperatorError, match="pool_mode"):
        operators.roi_align_forward(*[torch.zeros(1)] * 5, 1, 1, 1.0, 0, pool_mode=0, aligned=True)


def test_a_compiled_extension_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "NAME", "json")  # stands for any extension that is there
    monkeypatch.delitem(sys.modules, "json")
    assert operators.install() is False


def test_mmcv_describes_its_surroundings() -> None:
    if not operators.install():
        pytest.skip("a compiled mmcv is installed")
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version

    assert get_compiler_version() == get_compiling_cuda_version() == "n/a"


def test_a_folder_that_an_uninstalled_mmcv_left_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, operators.NAME, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    with pytest.raises(ImportError, match="needs MMDetection"):
        operators.install()
