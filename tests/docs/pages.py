"""The Markdown that the tests of the documentation read: its links, its blocks of code, the commands that it names."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *ROOT.glob("docs/**/*.md"),
    )
    if path.is_file()
]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]

FENCE = re.compile(r"(?ms)^( *)```(\w*)\n(.*?)^\1```")
SHELL = ("sh", "bash", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block of code: its language, its text, and the line of the page where it starts."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Of a page, in order."""
    text = page.read_text()
    return [Block(m[2], m[3], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def prose(page: Path) -> str:
    """A page without its blocks and comments."""
    return re.sub(r"(?s)<!--.*?-->", "", FENCE.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """Where a page leads to within the project, pictures included."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """What ``#...`` may say of a page: its headings, as Markdown names them."""
    headings = re.findall(r"(?m)^#+ (.*)$", FENCE.sub("", page.read_text()))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command that a page shows, in blocks of shell and as code in its sentences."""
    for block in blocks(page):
        if block.language in SHELL:
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from _words(line)
    for code in re.findall(r"`([^`]+)`", prose(page)):
        yield from _words(" ".join(code.split()))


def _words(line: str) -> Iterator[list[str]]:
    for part in re.split(r"&&|;|\|(?!\w)", line):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # a lone quotation mark: no command
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*|export|srun|time", words[0]):
            words = words[1:]
        if words[:1] == ["torchrun"] or words[:2] == ["--kill-on-bad-exit=1", "torchrun"]:
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
            words = ["python", *words[script:]]
        if words[:2] in (["python", "-m"], ["python3", "-m"]) and words[2:3] == ["revnets.cli"]:
            words = ["revnets", *words[3:]]
        if words:
            yield words
