"""Seconds of each block's forward pass on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..profiling.memory import call, synchronize
from ..reversible.replay import frozen_statistics, generators_kept, tree
from ..training.errors import refused
from .choices import BudgetError
from .step import Step, device_of, layout_of


def measured_seconds(model: nn.Module, step: Step) -> Callable[[Sequence[str]], list[float]]:
    """A function that times one forward pass (after one to warm up), by positions of the blocks that it is given.

    The passes run without gradient on random input; statistics and generators stay as they were.

    Raises:
        BudgetError: for a model without memory.
    """
    device = device_of(model)
    if any(p.is_meta for p in model.parameters()):
        raise BudgetError("time='measure' needs the model on a device: leave it out for one on 'meta'")

    def measure(names: Sequence[str]) -> list[float]:
        modules = dict(model.named_modules())
        with _Clock([modules[name] for name in names], device) as clock, generators_kept(torch.empty(0, device=device)):
            x = trial_inputs(step, device)
            with frozen_statistics(tree(model)), torch.no_grad(), refused("the timed pass", kind=BudgetError):
                for _ in range(2):  # the second one counts
                    clock.start()
                    if step.amp_dtype is None:
                        call(model, x)
                    else:
                        with torch.autocast(device.type, dtype=step.amp_dtype):
                            call(model, x)
                    clock.stop()
        return clock.seconds

    return measure


def trial_inputs(step: Step, device: torch.device) -> Any:
    """The inputs of a step on a device: those that were given, and where these have no memory, random numbers.

    Whole numbers are zeros then, which are indices of anything.
    """

    def made(like: Tensor) -> Tensor:
        if not like.is_meta:
            return like.detach().to(device, copy=True)
        fill = torch.randn if like.is_floating_point() else torch.zeros
        return fill(like.shape, device=device, dtype=like.dtype).to(memory_format=layout_of(like))

    return tree_map_only(Tensor, made, step.inputs)


class _Clock:
    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.modules, self.device = modules, device
        self.seconds = [0.0] * (2 * len(modules) + 1)
        self.hooks: list[Any] = []

    def __enter__(self) -> _Clock:
        for index, module in enumerate(self.modules):
            self.hooks.append(module.register_forward_pre_hook(lambda *_, place=2 * index: self._lap(place)))
            self.hooks.append(module.register_forward_hook(lambda *_, place=2 * index + 1: self._lap(place)))
        return self

    def __exit__(self, *exc: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def start(self) -> None:
        synchronize(self.device)
        self.seconds = [0.0] * len(self.seconds)
        self.last = time.perf_counter()

    def stop(self) -> None:
        self._lap(len(self.seconds) - 1)

    def _lap(self, place: int) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[place] += now - self.last
        self.last = now
