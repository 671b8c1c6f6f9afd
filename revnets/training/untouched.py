"""Trial steps of a training that leave no trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..reversible.replay import generators_kept
from .data.resumable import apart


@contextmanager
def untouched(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, x: Tensor, scaler: Any = None
) -> Iterator[None]:
    """Within, train as you like: afterwards all is as before, to the bit and in the same memory.

    Weights, gradients, buffers such as running statistics, the optimizer's state and groups, the scale of a loss
    scaler, and the generators of Python, NumPy, torch and the device of ``x``. Takes as much memory for a while.

    Args:
        model: that is trained.
        optimizer: of its weights, or None.
        x: an input.
        scaler: ``torch.amp.GradScaler``, or None.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before = layer.weight.item()
        >>> with untouched(layer, torch.optim.SGD(layer.parameters()), torch.ones(1)):
        ...     _ = layer.weight.data.fill_(7.0)
        >>> layer.weight.item() == before
        True
    """
    state = {p: dict(values) for p, values in optimizer.state.items()} if optimizer is not None else {}
    groups = [dict(group) for group in optimizer.param_groups] if optimizer is not None else []
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(m._buffers, dict(m._buffers)) for m in model.modules()]
    everything = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    everything += [v for values in (*state.values(), *groups) for v in values.values() if isinstance(v, Tensor)]
    kept = [t.detach().clone() for t in everything]
    scale = None if scaler is None else scaler.state_dict()
    try:
        with generators_kept(x), apart():
            yield
    finally:
        for slots, own in buffers:
            slots.update(own)
        with torch.no_grad():
            for tensor, value in zip(everything, kept, strict=True):
                tensor.copy_(value)
        for p, grad in gradients:
            p.grad = grad
        if optimizer is not None:
            for group, former in zip(optimizer.param_groups, groups, strict=True):
                group.update(former)
            optimizer.state.clear()
            optimizer.state.update(state)
        if scale:
            scaler.load_state_dict(scale)
