"""Counts the operator calls of a training step: on a GPU each is a launch or more, and small networks wait for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ...reversible.operators import DECOMPOSED
from ..memory import mean_square

aten = torch.ops.aten
_WITHOUT_KERNEL = {  # besides views: memory is taken, numbers are asked for, no kernel runs
    aten.empty.memory_format,
    aten.as_strided_.default,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten._local_scalar_dense.default,
    aten.detach.default,
    torch.ops.prim.device.default,
}
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear, aten.matmul, aten.mv, aten.addmv, aten.dot}


def is_launch(func: Any) -> bool:
    """Whether an operator runs something: views and empty tensors do not."""
    return not (func.is_view or func in _WITHOUT_KERNEL)


@dataclass(frozen=True)
class Launches:
    """What a step called.

    Attributes:
        calls: operator calls by name, an operator of ours counting once; views and empty tensors are left out.
        kernels: the same, with our operators taken apart into torch's own, as they run where no kernel of ours does.
        products: of these, the convolutions and products of matrices, a gradient of an input or a weight being one of
            its own: no fusion takes them away.
    """

    calls: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)

    @property
    def floor(self) -> int:
        """Number of the products."""
        return self.products.total()

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
        self.launches = Launches()
        self._inside = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled stays so inside; the kernels of a compiler are no operators, and are not seen here."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = DECOMPOSED.get(func)
        counted = is_launch(func)
        if counted and not self._inside:
            self.launches.calls[str(func._overloadpacket)] += 1
        if parts is None or self._inside:
            if counted:
                self.launches.kernels[str(func._overloadpacket)] += 1
                self._note_products(func, args, kwargs)
            return func(*args, **kwargs)
        self._inside = True
        try:
            with self:
                return parts(*args, **kwargs)
        finally:
            self._inside = False

    def _note_products(self, func: Any, args: Any, kwargs: Any) -> None:
        packet, products = func._overloadpacket, self.launches.products
        if packet is aten.convolution_backward:
            needed = kwargs.get("output_mask", args[-1])
            products["convolution's input"] += bool(needed[0])
            products["convolution's weight"] += bool(needed[1])
        elif packet is aten.convolution:
            products["convolution"] += 1
        elif packet in _PRODUCTS:
            products["matrix"] += 1


def count_launches(model: nn.Module, x: Tensor, loss_fn: Callable[[Any], Tensor] = mean_square) -> Launches:
    """Operator calls of forward and backward pass of a training step, the second one: nothing is set up any more.

    Gradients are set to None before, so that nothing is added up.

    Args:
        model: in training mode.
        x: its input, ``(N, C, H, W)``.
        loss_fn: of its output.
    """
    counter = LaunchCounter()
    for step in _two_steps(model):
        with counter if step else LaunchCounter():
            loss_fn(model(x)).backward()
    return counter.launches


@dataclass(frozen=True)
class Kernels:
    """What a step ran.

    Attributes:
        fused: kernels that ``torch.compile`` made, by name; on a GPU all kernels, whoever made them.
        others: operator calls besides, one of ours counting once; on a GPU none, they are among the former.
    """

    fused: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Of both."""
        return self.fused.total() + self.others.total()


def count_kernels(model: nn.Module, x: Tensor, loss_fn: Callable[[Any], Tensor] = mean_square) -> Kernels:
    """Kernels of a training step with compiled parts, the second one: as they run, not as they are generated.

    On a GPU, what the device ran, from torch's profiler. On a CPU, the loops that the compiler wrote, from the same
    profiler, and the operators that it left to torch (convolutions, say), counted as in ``count_launches``.

    Args:
        model: in training mode, not run since its parts were to be compiled.
        x: its input.
        loss_fn: of its output.
    """
    on_gpu, kernels = x.device.type == "cuda", Kernels()
    counter = LaunchCounter()
    with _named_loops():
        for step in _two_steps(model):
            if not step:
                loss_fn(model(x)).backward()
                continue
            with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
                with counter:
                    loss_fn(model(x)).backward()
                if on_gpu:
                    torch.cuda.synchronize(x.device)
    for event in profiler.events() or ():
        of_gpu = event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem")
        if of_gpu if on_gpu else "cpp_fused" in event.name:
            kernels.fused[event.name] += 1
    if not on_gpu:
        kernels.others.update(counter.launches.calls)
    return kernels


def _two_steps(model: nn.Module) -> Iterator[int]:
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = None
        yield step


@contextmanager
def _named_loops() -> Iterator[None]:
    """Within, the compiler's loops on the CPU tell the profiler that they run."""
    import torch._inductor.config as config

    options: Any = config
    with options.patch({"cpp.enable_kernel_profile": True}):
        yield
