"""The scripts of ``classification/`` and ``detection/`` as commands, and where they and ``configs/`` lie.

In a wheel the three folders lie in here, since their names alone would be anybody's; in a checkout beside ``revnets/``.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

__all__ = ["script"]
_INSIDE = Path(__file__).parent
_CHECKOUT = _INSIDE.parents[1]


def script(name: str) -> ModuleType:
    """The module of a script.

    Args:
        name: such as ``classification.train``.
    """
    if (_INSIDE / name.partition(".")[0]).is_dir():
        return import_module(f"{__name__}.{name}")
    if str(_CHECKOUT) not in sys.path:
        sys.path.insert(0, str(_CHECKOUT))  # loader processes that are spawned look there, too
    return import_module(name)
