"""What several processes of one run decide together, and what each of them has of its own."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def several() -> bool:
    """Whether this is one of several processes, which are connected.

    Example:
        >>> several()
        False
    """
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def of_first(decide: Callable[[], T]) -> T:
    """What the first process decides, in all of them: each by itself might see other files.

    All must call it; none goes on before the first has decided.

    Args:
        decide: Called in the first process only; what it gives is pickled.

    Raises:
        Exception: What ``decide`` raised, in all processes.

    Example:
        >>> of_first(lambda: "last.pth.tar")
        'last.pth.tar'
    """
    if not several():
        return decide()
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    decided: T = outcome[0]
    return decided


def at_first(value: T) -> list[T]:
    """The values of all processes, in the first; nothing in the others, or where there are no others.

    Args:
        value: Of this process; it is pickled.

    Example:
        >>> at_first(1)
        []
    """
    if not several():
        return []
    first = torch.distributed.get_rank() == 0
    values: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
    torch.distributed.gather_object(value, values)
    return values or []


def settle_buckets(model: nn.Module) -> None:
    """Have DDP group the gradients now as it will in every step, so that a resumed run sums them like a whole one.

    After the first backward pass DDP groups the gradients anew, in the order in which they came. Where in a group a
    gradient is decides in which order three or more processes sum it, and so its last bits: a run's first step, also
    after it was resumed, would round differently from the same step later. This is a first backward pass without the
    network: the gradients come from the last parameter to the first, as they do in training.

    All processes must call it, before hooks that watch gradients are added to the parameters.

    Args:
        model: What is trained; anything but a fresh ``DistributedDataParallel`` is left alone, and one with
            ``static_graph=True``, for which the first backward pass has to be as all others.

    Example:
        >>> settle_buckets(nn.Linear(2, 2))
    """
    if not isinstance(model, DistributedDataParallel) or model.static_graph:
        return
    network, device = model.module, next(model.parameters()).device
    model.module = _Sum(network)
    try:
        model(torch.zeros((), device=device)).backward()
    finally:
        model.module = network
    model.zero_grad()


class _Sum(nn.Module):
    """All parameters that are trained: the last gets its gradient first. Buffers are the network's, for DDP to find."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, total: Tensor) -> Tensor:
        for parameter in self.network.parameters():
            if parameter.requires_grad:
                total = total + parameter.sum()
        return total


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of this process that differ from the first's in any bit: running statistics, mostly.

    All processes must call it.

    Args:
        model: The same in all, but for its buffers; not wrapped.

    Returns:
        Copies on the CPU, by name.

    Example:
        >>> own_buffers(nn.BatchNorm2d(3))
        {}
    """
    if not several():
        return {}
    buffers = {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}
    digests = {name: _digest(buffer) for name, buffer in buffers.items()}
    firsts = of_first(lambda: digests)
    return {name: buffer.clone() for name, buffer in buffers.items() if digests[name] != firsts.get(name)}


@torch.no_grad()
def put_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set some buffers of a model; names that it lacks are passed over.

    Args:
        model: Not wrapped.
        values: By name.

    Example:
        >>> norm = nn.BatchNorm2d(1)
        >>> put_buffers(norm, {"running_mean": torch.ones(1)})
        >>> norm.running_mean
        tensor([1.])
    """
    for name, buffer in model.named_buffers():
        if name in values:
            buffer.copy_(values[name])


def _digest(buffer: Tensor) -> bytes:
    return hashlib.blake2b(buffer.contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()
