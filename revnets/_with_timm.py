"""Registers the networks with timm without importing it: at once where it is there, else as soon as somebody does.

So `import revnets` costs nothing, and `revnets --help` answers before torch would have been read from the disk.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_timm() -> None:
    """Has ``timm.create_model`` know the networks, whichever of timm and this package is imported first."""
    if "timm" in sys.modules:
        importlib.import_module(f"{__package__}.models")
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Sees timm being imported, and modules of ours, which may ask for it while they are half there themselves.

    The networks are imported once timm is there and none of ours is half there in this thread.
    """

    def __init__(self) -> None:
        self.under_way = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm" and not fullname.startswith(f"{__package__}."):
            return None
        others = (finder.find_spec(fullname, path, target) for finder in list(sys.meta_path) if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader, self)
        return spec

    def settle(self) -> None:
        """Imports the networks if it is time; called after each import that was seen."""
        if self.under_way.depth == 0 and "timm" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module(f"{__package__}.models")


class _Watched(Loader):
    """Another loader, and what is to be done after it."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        state, ours = self.watch.under_way, module.__name__ != "timm"
        state.depth = getattr(state, "depth", 0) + ours
        try:
            self.loader.exec_module(module)
        finally:
            state.depth -= ours
        self.watch.settle()
