"""The site is built, with warnings as errors and nothing from elsewhere; the reference has all that is public."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'revnets[docs]'")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install 'revnets[docs]'")

REFERENCE = {path.stem: path for path in (ROOT / "docs" / "api").glob("*.md")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in ROOT.glob("docs/**/*.md")}
    assert [page for page in sorted(pages) if not (site / page).is_file()] == []


def test_nothing_is_fetched(site: Path) -> None:
    """No script, style, font or picture of another host: links that somebody may click are all there is."""
    for page in site.glob("**/*.html"):
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="((?:https?:)?//[^"]+)"', page.read_text())
        assert fetched == [], f"{page.name}: {fetched}"


def test_examples_are_shown_as_they_are(site: Path) -> None:
    shown = "".join(path.read_text() for path in (site / "tutorials").glob("*.html"))
    for example in (ROOT / "examples").glob("*.py"):
        assert f"source/examples/{example.name}" in shown
        last = [line for line in example.read_text().splitlines() if "print(" in line or "=dict(" in line][-1]
        word = re.findall(r"\w{5,}", last)[-1]
        assert word in shown, f"{example.name} is not on any page"
        assert (site / "source" / "examples" / example.name).read_text() == example.read_text()


@pytest.mark.parametrize("name", sorted(set(REFERENCE) - {"models", "training"}))
def test_reference_has_all_that_is_public(site: Path, name: str) -> None:
    if name == "mm":
        pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    package = "revnets" if name == "revnets" else f"revnets.{name}"
    module = importlib.import_module(package)
    text = (site / "api" / f"{name}.html").read_text()
    found = set(re.findall(r'id="([\w.]+)"', text))
    missing = []
    for public in module.__all__:
        value = getattr(module, public)
        paths = {f"{package}.{public}", f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"}
        if not isinstance(value, type(module)) and not paths & found and public != "__version__":
            missing.append(public)
    assert missing == []


def test_formulas_are_shown_as_code(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api" / "reversible.html").read_text())
    assert r"u_j = x_j + \sum_{i&lt;j} D_{ij}(x_i)" in text
    assert not re.search(r":math:|\.\. math", "".join(path.read_text() for path in site.glob("api/*.html")))
