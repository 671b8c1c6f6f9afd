"""The stand-in as a file in mmcv's folder, where ``mmcv.ops`` looks by itself: no tool of MMDetection needs a launcher.

Some of them import ``mmdet.models``, and so ``mmcv.ops``, before they read the config whose ``custom_imports`` would
put the stand-in there.
"""

import importlib.machinery
import importlib.util
from pathlib import Path

from ...training.files import whole_file

NAME = "mmcv._ext"
MARK = "# mmcv's operators by torch's kernels: `python -m revnets.mm --install` wrote this, `--uninstall` removes it."
SOURCE = f"""{MARK}
# A compiled extension, where there is one, is found first. Nothing is imported before an operator is called:
# revnets.mm itself imports mmdet.models, which is what imports this.


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def operator(*args, **kwargs):
        from revnets.mm.operators import operator

        return operator(name)(*args, **kwargs)

    return operator
"""


def add() -> Path | None:
    """Write the file, over an older one of ours.

    Returns:
        it, or None where mmcv has another extension, a compiled one.

    Raises:
        NotWritten: mmcv's folder is not writable, say.
    """
    if is_compiled():
        return None
    path = _folder() / "_ext.py"
    with whole_file(path) as temporary:
        temporary.write_text(SOURCE, encoding="utf-8")
    return path


def remove() -> Path | None:
    """Remove the file.

    Returns:
        where it was; None where there was none of ours.

    Raises:
        OSError: mmcv's folder is not writable, say.
    """
    path = _folder() / "_ext.py"
    if not is_ours(str(path)):
        return None
    path.unlink()
    return path


def is_compiled() -> bool:
    """Whether mmcv has an extension that is not ours."""
    spec = importlib.machinery.PathFinder.find_spec(NAME, [str(_folder())])
    return spec is not None and not is_ours(spec.origin)


def is_ours(path: str | None) -> bool:
    """Whether a file is one that ``add`` wrote."""
    if path is None or Path(path).name != "_ext.py" or not Path(path).is_file():
        return False
    return Path(path).read_text(encoding="utf-8").startswith(MARK)


def _folder() -> Path:
    spec = importlib.util.find_spec("mmcv")
    if spec is None or spec.origin is None:
        raise ImportError("revnets.mm needs MMDetection: pip install 'revnets[detection]'")
    return Path(spec.origin).parent
