"""Counts the operator calls of a training step: on a GPU each is a launch or more, and small networks wait for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..reversible.operators import DECOMPOSED

aten = torch.ops.aten
_WITHOUT_KERNEL = {  # besides views: memory is taken, numbers are asked for, no kernel runs
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten._local_scalar_dense.default,
    aten.detach.default,
    torch.ops.prim.device.default,
}


@dataclass(frozen=True)
class Launches:
    """What a step called.

    Attributes:
        calls: operator calls by name, an operator of ours counting once; views and empty tensors are left out.
        kernels: the same, with our operators taken apart into torch's own, as they run where no kernel of ours does.
    """

    calls: Counter[str]
    kernels: Counter[str]

    def __str__(self) -> str:
        return f"{self.calls.total():,} operator calls, {self.kernels.total():,} of torch's own"


class LaunchCounter(TorchDispatchMode):
    """Dispatch mode that counts the operators called inside it.

    Example:
        >>> with LaunchCounter() as counter:
        ...     _ = (torch.ones(2) + 1).view(1, 2)
        >>> counter.launches.calls
        Counter({'aten.ones': 1, 'aten.add': 1})
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = Launches(Counter(), Counter())
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = DECOMPOSED.get(func)
        counted = not (func.is_view or func in _WITHOUT_KERNEL)
        if counted and not self._inside:
            self.launches.calls[str(func._overloadpacket)] += 1
        if parts is None or self._inside:
            if counted:
                self.launches.kernels[str(func._overloadpacket)] += 1
            return func(*args, **kwargs)
        self._inside = True
        try:
            with self:
                return parts(*args, **kwargs)
        finally:
            self._inside = False


def count_launches(model: nn.Module, x: Tensor) -> Launches:
    """Operator calls of forward and backward pass of a training step, the second one: nothing is set up any more.

    Gradients are set to None before, so that nothing is added up.

    Args:
        model: in training mode; any module whose output is a tensor.
        x: its input, ``(N, C, H, W)``.
    """
    launches = Launches(Counter(), Counter())
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = None
        with LaunchCounter() as counter:
            model(x).square().mean().backward()
        launches = counter.launches
    return launches
