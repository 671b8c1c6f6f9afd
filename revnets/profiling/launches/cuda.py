"""Counts the kernels that a training step would start on CUDA with Triton, on any machine: fake tensors run it.

What it assumes, as nothing is run:

- An operator of ours starts what its implementation for CUDA starts: Triton kernels, and torch's operators in it.
- Any other operator is one kernel (views and empty tensors none), but for the backward pass of a convolution, which is
  one for each gradient that is asked for. cuDNN may need more: it may change layouts, or split a sum.
- A list of tensors (``torch._foreach_...``) is one kernel; torch splits long lists.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...reversible.cuda import WATCHERS
from ..fake import ProfileError, explain, fake_input, fake_twin, new_fake_mode
from ..kernel_memory import FAKE_KERNELS, decomposition
from ..memory import mean_square
from .counting import is_launch

aten = torch.ops.aten
_CUDA, _CPU = torch.device("cuda", 0), torch.device("cpu")


class CudaCounter(TorchDispatchMode):
    """Dispatch mode that counts kernels of the fake CUDA tensors inside it.

    torch's engine, which runs the backward pass, is told that they are on a CPU: for CUDA's it would ask a driver. What
    is written in Python sees CUDA.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.op = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _CPU
        if (parts := decomposition(func, _CUDA)) is not None:
            with self:
                return parts(*args, **kwargs)
        self.op = str(func)
        if func is aten.convolution_backward.default:
            input_, weight, bias = kwargs.get("output_mask", args[-1])
            self.kernels += Counter({f"{func._overloadpacket}": bool(input_) + bool(weight) + bool(bias)})
        elif is_launch(func):
            self.kernels[str(func._overloadpacket)] += 1
        return FAKE_KERNELS.get(func, func)(*args, **kwargs)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, the counter is on, and our own kernels tell it when they would be started."""

        def note(kernel: str) -> None:
            self.kernels[f"triton.{kernel}"] += 1

        WATCHERS.append(note)
        try:
            with self:
                yield
        finally:
            WATCHERS.remove(note)


def count_cuda_kernels(model: nn.Module, x: Any, loss_fn: Callable[[Any], Tensor] = mean_square) -> Counter[str]:
    """Kernels of forward and backward pass, by name: a Triton kernel of ours as ``triton.NAME``.

    Args:
        model: in training mode, on any device; it is left as it is.
        x: its input.
        loss_fn: of its output.

    Raises:
        ProfileError: for a network that fake tensors cannot run.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        >>> dict(count_cuda_kernels(net, torch.ones(1, 3, 2, 2), lambda y: y.sum()))  # doctest: +NORMALIZE_WHITESPACE
        {'aten.convolution': 1, 'aten.relu': 1, 'aten.sum': 1, 'aten.ones_like': 1, 'aten.threshold_backward': 1,
        'aten.convolution_backward': 2}
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True  # it logs tracebacks of what becomes one sentence here
    counter = CudaCounter()
    try:
        with new_fake_mode():
            twin, inputs = fake_twin(model, _CUDA), fake_input(x, _CUDA)
            with counter.watching():
                loss_fn(twin(inputs)).backward()
    except ProfileError:
        raise
    except Exception as error:  # of the model or the loss, which somebody chose
        raise explain(error, counter.op) from error
    finally:
        logger.disabled = before
    return counter.kernels
