"""The scripts where MMDetection is not installed, as after `pip install revnets` alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = {"train": ["x.py"], "test": ["x.py", "x.pth"], "quickstart": ["--output", "out", "--data-dir", "data"]}
SCRIPT = """
import importlib, sys

sys.modules.update(dict.fromkeys(("mmengine", "mmcv", "mmdet")))  # None: not to be found
for name, line in {lines}.items():
    script = importlib.import_module(f"detection.{{name}}")
    sys.stderr.write(f"{{name}} {{script.main([*line])}} ")
"""


def test_every_script_says_what_to_install(tmp_path: Path) -> None:
    """They are imported, too: `--help` works."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})" + SCRIPT.format(lines=LINES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    words = "error: MMDetection's mmengine is not installed: pip install 'revnets[detection]'\n"
    assert done.stderr == "".join(f"{words}{name} 2 " for name in LINES)
    assert not list(tmp_path.iterdir())
