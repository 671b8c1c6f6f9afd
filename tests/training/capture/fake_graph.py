"""A stand-in for CUDA graphs, which lets the code around them be tested without a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revnets.reversible import operators


class FakeGraph:
    """Records the operators of a step with the tensors that they read and write, and repeats those, in place.

    So a replay calls nothing of the step's own code, as on a GPU: what that code decided when it was captured, it
    decided for all replays, and what it has not put into place is old.
    """

    captures = 0

    def __init__(self, device: torch.device, beside: Any = None) -> None:
        self.steps: list[tuple[Any, Any, Any, list[Tensor], Any]] = []

    @staticmethod
    def exists(device: torch.device) -> bool:
        return True

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def capture(self, run: Callable[[], None]) -> None:
        """Nothing of it is done: what it writes to outside tensors, and draws, is undone."""
        type(self).captures += 1
        generator, recorder = torch.get_rng_state(), _Recorder()
        with pytest.MonkeyPatch.context() as patch, recorder:
            patch.setattr(torch, "get_rng_state", _forbidden)
            run()
        self.steps = recorder.steps
        torch.set_rng_state(generator)
        for storage, value in recorder.outside.values():
            storage.copy_(value)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results, operators._outside.precision in self.steps:
                for old, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)
        operators._outside.precision = None

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        return values.tolist


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor], Any]] = []
        self.outside: dict[int, tuple[Any, Any]] = {}  # what is written to and was there before, with its value
        self._inside: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            _forbidden()
        kwargs = kwargs or {}
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        written += ["running_mean", "running_var"]  # torch's batch norms do not say so
        for tensor in _tensors([given.get(name) for name in written]):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._inside:
                self.outside.setdefault(storage.data_ptr(), (storage, storage.clone()))
        found = func(*args, **kwargs)
        results, known = _tensors(found), {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self._inside |= {t.untyped_storage().data_ptr() for t in results} - known
        self.steps.append((func, args, kwargs, results, operators._outside.precision))
        return found


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def _forbidden(*_: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")
