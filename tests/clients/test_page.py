"""Every section of docs/clients.md runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from tests.clients.steps import client

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
CLIENTS = {
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    **{name: name.lower() for name in ("transformers", "Lightning", "accelerate", "peft", "mmpose")},
    "mmsegmentation": "mmseg",
}
SECTIONS = dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", SECTIONS)
def test_section(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if section in CLIENTS:
        client(CLIENTS[section])
    (code,) = CODE.findall(SECTIONS[section])
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, f"{PAGE.name}, {section}", "exec"), {"__name__": section})
