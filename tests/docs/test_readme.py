"""README is short, its programs run and print what it says, and so do those of the tutorials."""

import re
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, blocks

README = ROOT / "README.md"
FRAGMENTS = {
    "custom_imports": "it names what MMEngine reads",
    "for images, target in loader": "the loop around it is the reader's",
    "revnets.use_sparse_kernel": "its network is the reader's",
    "fully_shard": "needs several processes",
}
"""What cannot run by itself, by a piece of it, and why."""


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_readme_begins_with_a_sentence_a_picture_and_a_command() -> None:
    text = README.read_text()
    assert text.index("![") < text.index("```sh") < text.index("## Networks")
    assert text[: text.index("make quickstart")].count("\n") < 30


def test_every_program_says_what_it_prints() -> None:
    shown = blocks(README)
    for block, following in zip(shown, [*shown[1:], None], strict=True):
        if block.language == "python":
            assert "print(" in block.text
            assert following is not None
            assert following.language == "", f"line {block.line}: what it prints should follow"


@pytest.mark.parametrize("index", [i for i, b in enumerate(blocks(README)) if b.language == "python"])
def test_programs_of_the_readme(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    program, printed = blocks(README)[index : index + 2]
    if "mmdet" in program.text:
        pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    exec(program.text, {})
    assert capsys.readouterr().out.splitlines()[-1:] == printed.text.splitlines()


RUN_HERE = [page for page in PAGES if page != README and page.name != "clients.md"]  # that one's in tests/clients


@pytest.mark.parametrize("page", RUN_HERE, ids=[page.name for page in RUN_HERE])
def test_programs_of_the_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page in a row, as somebody who reads it would type them, on small networks."""
    monkeypatch.chdir(tmp_path)  # some write files
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language != "python" or "--8<--" in block.text:
            continue
        program = compile(_small(block.text), f"{page}:{block.line}", "exec")
        if not any(piece in block.text for piece in FRAGMENTS):
            exec(program, names)


def _small(program: str) -> str:
    for name, small in SMALL.items():
        program = re.sub(rf"\b{name}\b", small, program)
    return program


SMALL = {r"revbifpn_s\d": "test_revbifpn", "resnet(18|50)": "test_resnet", "mus_vit_tiny_patch16_224": "test_mus_vit"}
SMALL |= {"vit_small_patch16_224": "test_vit", "pretrained=True": "pretrained=False"}  # nothing is fetched
