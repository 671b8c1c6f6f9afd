"""The map in CONTRIBUTING.md is that of the folders. ``python -m tests.test_contributing`` writes it."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from revnets import __version__

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
MAP = re.compile(r"(<!-- map: [^\n]*-->\n)(.*?)(<!-- end of the map -->)", re.DOTALL)
ROW = re.compile(r"^\| `([^`]+)/` \| (.+) \|$", re.MULTILINE)
CONTRACT = r'id = "{name}".*?^layers = \[(.*?)^\]'
SECTIONS = ("reversible op", "layer", "model", "engine")


def first_sentence(folder: Path) -> str:
    """Of a package's docstring."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0].replace("``", "`")


def order() -> list[str]:
    """Rooms as the import contracts have them, from the one that knows no other up."""
    return [*contract("rooms", "revnets"), "classification", *contract("classification", "classification"), "detection"]


def contract(name: str, folder: str) -> list[str]:
    """What one contract has of a folder, from the lowest up."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(CONTRACT.format(name=name), text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return [f"{folder}/{layer}" for line in reversed(found[1].splitlines()) for layer in re.findall(r"\w+", line)]


def rooms() -> dict[str, str]:
    """Folder and sentence of each package; folders within a room come after it."""
    known = order()
    packages = [file.parent for top in ("revnets", "classification", "detection") for file in top_packages(top)]
    found = {folder.relative_to(ROOT).as_posix(): first_sentence(folder) for folder in packages}

    def place(name: str) -> tuple[int, str]:
        room = max(
            (number for number, room in enumerate(known) if f"{name}/".startswith(f"{room}/")), default=len(known)
        )
        return room, name

    return {name: found[name] for name in sorted(found, key=place)}


def top_packages(top: str) -> list[Path]:
    return [file for file in (ROOT / top).rglob("__init__.py") if file.parent != ROOT / "revnets"]


def table() -> str:
    """The map as Markdown."""
    rows = [f"| `{name}/` | {sentence} |" for name, sentence in rooms().items()]
    return "\n".join(["| room | what lives there |", "|---|---|", *rows]) + "\n"


def test_the_map_is_that_of_the_folders() -> None:
    written = MAP.search(PAGE.read_text(encoding="utf-8"))
    assert written is not None
    assert dict(ROW.findall(written[2])) == rooms(), "python -m tests.test_contributing writes the map"
    assert written[2] == table()


def test_every_room_says_what_lives_there() -> None:
    assert all(sentence.endswith(".") and len(sentence) > 20 for sentence in rooms().values())


@pytest.mark.parametrize("what", SECTIONS)
def test_how_to_add_things(what: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^## An? {what}.*?(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    assert "\n1. " in section[0]
    assert "\n2. " in section[0]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/reporting.md"])
def test_paths_that_are_named_are_there(page: str) -> None:
    named = set(
        re.findall(r"`((?:revnets|classification|detection|tests|configs|docs)/[\w./]+)`", (ROOT / page).read_text())
    )
    named -= {name for name in named if "NAME" in name}
    assert not [name for name in named if not (ROOT / name).exists()]


def test_targets_that_are_named_are_there() -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    known = subprocess.run(["make", "-qp"], cwd=ROOT, capture_output=True, text=True).stdout
    assert named <= set(re.findall(r"^([a-z][\w-]*):", known, re.MULTILINE))


def test_papers_to_cite() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    papers = {each["identifiers"][0]["value"].removeprefix("arXiv:") for each in cited["references"]}
    assert papers == {"2206.14098", "2303.11525", "2502.05967", "2303.10464", "2405.03594"}
    assert cited["version"] == __version__
    assert all(author["family-names"] for each in cited["references"] for author in each["authors"])


def test_changes_begin_with_those_that_are_not_released() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert __version__ in headings


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MAP.sub(lambda found: found[1] + table() + found[3], page), encoding="utf-8")
