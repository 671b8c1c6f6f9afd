"""What a wheel holds, and that it works where nothing of the checkout is; all of it: `make test-wheel`."""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path

import pytest

from .wheel import ROOT, SHIPPED, Environment, build, contents, use

pytestmark = pytest.mark.slow
PLACES = {"revnets": "revnets", **{name: f"revnets/scripts/{name}" for name in SHIPPED[1:]}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("build", reason="PyPA's build makes the wheel: pip install 'revnets[dev]'")
    return build(tmp_path_factory.mktemp("wheel"))


def expected() -> set[str]:
    """Every source, configuration and kernel, where it belongs."""
    kinds = {"revnets": {".py", ".cpp", ".h", ".typed"}, "configs": {".py", ".yaml"}}
    files = set()
    for name, place in PLACES.items():
        for file in (ROOT / name).rglob("*"):
            if file.suffix in kinds.get(name, {".py"}) or file.name == "py.typed":
                files.add(f"{place}/{file.relative_to(ROOT / name).as_posix()}")
    return files


def test_the_wheel_holds_every_source_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = contents(built[1])
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == expected()
    assert {name.partition("/")[0] for name in inside} == {"revnets"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_wheel_is_made_of(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"} <= names
    assert "configs/detection/_base_/datasets/digits.py" in names
    assert not [name for name in names if name.startswith("tests")]


def test_the_wheel_works_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    environment = Environment(tmp_path, quiet=True)
    environment.make(built[1], borrow=True)
    use(environment, detect=importlib.util.find_spec("mmdet") is not None)
