"""Lets pages link to files of the project outside of docs/: the files come along, under source/.

Such links work in a checkout as they are; on the site they lead to a copy. One that leads nowhere is left alone, and
`mkdocs build --strict` names it.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(\]\()(\.\.?/[^)#\s]+|[^)#\s:]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that pages link to and that lie outside of the documentation."""
    root = _root(config)
    for page in list(files.documentation_pages()):
        for _, name in _outside(page.src_uri, page.content_string, root):
            if files.get_file_from_path(_copy(name)) is None:
                files.append(File.generated(config, _copy(name), abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Has their links lead to the copies."""
    for link, name in _outside(page.file.src_uri, markdown, _root(config)):
        here = posixpath.dirname(page.file.src_uri) or "."
        markdown = markdown.replace(f"]({link}", f"]({posixpath.relpath(_copy(name), here)}")
    return markdown


def _outside(page: str, markdown: str, root: Path) -> Iterator[tuple[str, str]]:
    """Links of a page to files outside of docs/, and their names from the root of the project; each once."""
    for link in sorted({found[2] for found in LINK.finditer(markdown)}):
        name = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
        if not name.startswith(("docs/", "../")) and (root / name).is_file():
            yield link, name


def _copy(name: str) -> str:
    """Where the copy of a file lies; what would become a page is shown as text."""
    return f"source/{name}" + (".txt" if name.endswith(".md") else "")


def _root(config: Any) -> Path:
    return Path(config["config_file_path"]).parent
