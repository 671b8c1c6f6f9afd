"""Runs a script of MMDetection, unmodified, with the operators' stand-in in place before anything is imported.

python -m revnets.mm test.py CONFIG CHECKPOINT
python -m revnets.mm analysis_tools/get_flops.py CONFIG

Checkpoints are read as data. For an old one that holds more, and that you trust, set REVNETS_TRUST_CHECKPOINTS=1.
"""

import runpy
import sys
from pathlib import Path


def main() -> int:
    """``sys.argv``: a script, by its path or as MMDetection's ``tools/`` call it, and its arguments."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.stderr.write(f"{__doc__}\n")
        return 0 if len(sys.argv) > 1 else 2
    import mmdet

    from ..training.errors import guarded
    from .checkpoint import protect

    tools = Path(mmdet.__file__).parent / ".mim" / "tools"
    script = next((path for path in (Path(sys.argv[1]), tools / sys.argv[1]) if path.is_file()), None)
    if script is None:
        known = ", ".join(sorted(str(path.relative_to(tools)) for path in tools.rglob("*.py")))
        sys.stderr.write(f"error: there is no script '{sys.argv[1]}', here or among MMDetection's: {known}\n")
        return 2
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(script.parent))
    protect()
    return guarded(lambda: runpy.run_path(str(script), run_name="__main__"))


if __name__ == "__main__":
    sys.exit(main())
