"""Mixed precision for MMEngine's runner on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Forward passes under bfloat16 autocast, whose range needs no loss scaling; on CPUs, too.

    MMEngine's ``AmpOptimWrapper`` is for GPUs only.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 2))
        >>> wrapper = Bf16OptimWrapper(optimizer=torch.optim.SGD([weight], lr=0.1))
        >>> with wrapper.optim_context(nn.Identity()):
        ...     (weight @ weight).dtype
        torch.bfloat16
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[Any]:
        """Of the forward pass."""
        with super().optim_context(model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield
