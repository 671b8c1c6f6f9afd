"""One registration for all toolboxes of MMEngine's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REASON = "MMDetection is not installed: pip install 'revnets[detection]'"
pytest.importorskip("revnets.mm", reason=REASON, exc_type=ImportError)

from mmengine.registry import MODELS, Registry  # noqa: E402

ROOT = Path(__file__).parents[3]
NETWORKS = ("RevBiFPN", "TimmBackbone", "RevBiFPNNeck", "LeanHRFPN")

WITHOUT_MMDET = """
import sys
from importlib.machinery import PathFinder

class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "mmdet" else PathFinder.find_spec(name, path, target)

sys.meta_path = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]
import torch
import revnets.mm
from mmengine.registry import MODELS, Registry

assert "mmdet" not in sys.modules
backbone = Registry("model", parent=MODELS, scope="toolbox").build(dict(type="RevBiFPN", arch="test"))
wrapper = revnets.mm.Bf16OptimWrapper(optimizer=torch.optim.SGD(backbone.parameters(), lr=0.1))
with wrapper.optim_context(backbone):
    y = backbone(torch.zeros(1, 3, 32, 32))
print([tuple(each.shape[1:]) for each in y], sorted(set(revnets.mm.__all__) - set(vars(revnets.mm))))
"""


@pytest.mark.parametrize("name", NETWORKS)
def test_found_from_any_toolbox(name: str) -> None:
    from mmdet.registry import MODELS as OF_MMDET

    theirs = Registry("model", parent=MODELS, scope="of_a_test")
    try:
        assert theirs.get(name) is theirs.get(f"mmdet.{name}") is OF_MMDET.get(f"mmdet.{name}") is MODELS.get(name)
    finally:
        MODELS.children.pop("of_a_test")


def test_no_toolbox_is_needed_that_is_not_there() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_MMDET], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[(16, 16, 16), (16, 8, 8), (32, 4, 4), (96, 2, 2)] []"


def test_one_that_does_not_go_with_its_mmcv_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "mmdet").mkdir()
    (tmp_path / "mmdet" / "__init__.py").write_text("raise AssertionError('MMCV==9 is used but incompatible')\n")
    script = 'import revnets.mm\nfrom mmengine.registry import MODELS\nprint(MODELS.get("RevBiFPN").__name__)'
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "RevBiFPN"
    assert "MMCV==9" in done.stderr
