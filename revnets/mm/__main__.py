"""Runs a script of MMDetection, unmodified, with the operators' stand-in in place before anything is imported.

python -m revnets.mm test.py CONFIG CHECKPOINT
python -m revnets.mm analysis_tools/get_flops.py CONFIG
python -m revnets.mm ./test.py                               # one of this folder, not MMDetection's of that name
python -m revnets.mm --install                               # once, instead: then they find the operators themselves
python -m revnets.mm --uninstall

Runs hold their work folder, COCO data sets are checked, and checkpoints are read as data. For an old one that holds
more, and that you trust, set REVNETS_TRUST_CHECKPOINTS=1.
"""

import os
import runpy
import sys
from pathlib import Path


def main() -> int:
    """``sys.argv``: a script, by its path or as MMDetection's ``tools/`` call it, and its arguments."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.stderr.write(f"{__doc__}\n")
        return 0 if len(sys.argv) > 1 else 2
    if sys.argv[1:] in (["--install"], ["--uninstall"]):
        return _plug_in(sys.argv[1] == "--install")
    import mmdet

    from ..training.errors import UserError, guarded, one_line
    from ..training.files import NotWritten
    from .coco import check_all
    from .hooks.checkpoint import protect

    tools = Path(mmdet.__file__).parent / ".mim" / "tools"
    here, own = Path(sys.argv[1]), tools / sys.argv[1]
    named = os.path.isabs(sys.argv[1]) or sys.argv[1].startswith((f".{os.sep}", f"..{os.sep}"))
    script = next(
        (path for path in ((here,) if named else (own, here)) if path.is_file()), None
    )  # none that lies about
    if script is None:
        known = ", ".join(sorted(str(path.relative_to(tools)) for path in tools.rglob("*.py")))
        sys.stderr.write(f"error: there is no script '{sys.argv[1]}', here or among MMDetection's: {known}\n")
        return 2
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(script.parent))
    protect()
    check_all()

    def run() -> None:
        try:
            runpy.run_path(str(script), run_name="__main__")
        except NotWritten:  # a full disk, say
            raise
        except (OSError, SyntaxError) as error:  # files that are not there, and configurations that are no Python
            raise UserError(f"{script}: {one_line(error)}; correct its arguments.") from error

    return guarded(run)


def _plug_in(add: bool) -> int:
    from ..training.errors import guarded
    from ..training.files import writing
    from .operators import plug_in

    def run() -> None:
        if add:
            path = plug_in.add()
            print(f"mmcv.ops finds '{path}'" if path else "mmcv has compiled operators: there is nothing to install")
            return
        with writing("mmcv/_ext.py"):
            path = plug_in.remove()
        print(f"'{path}' is removed" if path else "there is nothing to remove")

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
