"""README is short, its programs run and print what it says, and so do those of the tutorials."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, blocks

README = ROOT / "README.md"
PROGRAMS = [
    pytest.param(page, block.text, id=f"{page.relative_to(ROOT)}:{block.line}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "python" and "--8<--" not in block.text
]
FRAGMENTS = {
    "a config of MMDetection": "it names what MMEngine reads",
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
def test_programs_of_the_readme(index: int, tmp_path: Path) -> None:
    program, printed = blocks(README)[index : index + 2]
    if "mmdet" in program.text:
        pytest.importorskip("mmdet", reason="MMDetection is not installed: pip install 'revnets[detection]'")
    assert _run(program.text, tmp_path).splitlines()[-1:] == printed.text.splitlines()


@pytest.mark.parametrize(("page", "program"), [p for p in PROGRAMS if p.values[0] != README])
def test_programs_of_the_pages_compile(page: Path, program: str) -> None:
    compile(program, str(page), "exec")


def test_programs_of_the_pages_run(tmp_path: Path) -> None:
    """All of a page in a row, as somebody who reads it would type them."""
    for page in dict.fromkeys(p.values[0] for p in PROGRAMS):
        texts = [p.values[1] for p in PROGRAMS if p.values[0] == page and page != README]
        whole = "\n".join(text for text in texts if not any(piece in text for piece in FRAGMENTS))
        if whole:
            _run(re.sub(r"revbifpn_s\d", "test_revbifpn", whole), tmp_path)


def _run(program: str, folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{program}\n{done.stderr[-2000:]}"
    return done.stdout
