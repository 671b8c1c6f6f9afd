"""Exact mode's range guard in several processes: all leave a step out, or none."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...reversible import RangeError
from ...reversible.node import range_checks_put_off
from ..processes import several


class AgreedRangeError(RangeError):
    """A value left the grid's range in one of several processes; raised in all of them, before the backward pass."""


@contextmanager
def ranges_agreed() -> Iterator[None]:
    """Has all processes raise if one of them leaves the range of exact mode in the forward pass within.

    One that raised alone would leave the others waiting for its gradients. So each ends its forward pass, and they ask
    each other before any of them begins the backward pass: an accelerator waits for that once per step. Without exact
    mode, or in a single process, nothing is done.

    Raises:
        AgreedRangeError: In all processes, with the number of the first that left the range, and its error.

    Example:
        >>> with ranges_agreed():
        ...     loss = torch.nn.Linear(1, 1)(torch.ones(1)).sum()
    """
    if not several():
        yield
        return
    with range_checks_put_off() as guards:
        yield
    if not guards:
        return
    device, words = guards[0].device, ""
    try:
        for guard in guards:
            guard.settle()
    except RangeError as error:
        words = " ".join(str(error).split())
    votes = torch.tensor(float(bool(words)), device=device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
    if votes.item():
        said: list[str] = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, words)
        process = next(index for index, each in enumerate(said) if each)
        raise AgreedRangeError(f"process {process}: {said[process]}")
