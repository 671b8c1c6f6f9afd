"""Which room may import which: the contracts of pyproject.toml, read from the sources without running them."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("importlinter") is None, reason="import-linter is not installed: pip install 'revnets[dev]'"
)
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("revnets", "classification", "detection")


def broken(folder: Path, cache: Path) -> str:
    """What the linter says of the sources in a folder, if they break a contract."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--cache-dir", str(cache), "--no-logo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "Analyzed" in done.stdout
    return done.stdout if done.returncode else ""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources, to be changed."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    return tmp_path


def test_imports_point_down_and_in_no_circle(tmp_path: Path) -> None:
    assert not broken(ROOT, tmp_path)


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("revnets/profiling/memory.py", "import revnets.mm.amp", "revnets.profiling is not allowed to import"),
        ("revnets/layers/sites.py", "def late():\n    from ..models import named", "revnets.layers is not allowed"),
        ("detection/sizes.py", "import classification.images", "detection is not allowed to import classification"),
        ("classification/images/data.py", "from ..run import loop", "classification.images is not allowed to import"),
        ("classification/networks/models.py", "from ..images import data", "classification.networks is not allowed"),
        ("revnets/layers/registry.py", "from .munit import fp8", "munit"),
        ("revnets/attic/__init__.py", "", "attic"),
        ("classification/attic/__init__.py", "", "attic"),
    ],
    ids=[
        "upwards",
        "upwards and late",
        "one script of the other",
        "upwards in a script",
        "beside in a script",
        "a circle of folders",
        "a room without a place",
        "a script's room without a place",
    ],
)
def test_what_breaks_a_contract_is_named(file: str, line: str, said: str, copy: Path, tmp_path: Path) -> None:
    path = copy / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as opened:
        opened.write(f"\n{line}\n")
    assert said in broken(copy, tmp_path / "cache")
