"""Branches through ``torch.compile``: the engine stays as it is, what it calls becomes faster."""

from typing import Any

import torch
from torch import nn

from .op import ReversibleOp


def compile_branches(model: nn.Module, **options: Any) -> nn.Module:
    """Compile every branch of every reversible op of ``model`` in place, each by itself; weights stay as they are.

    All modes run the same code afterwards, so exact mode stays exact and ``store`` and ``reversible`` agree to the
    bit. Compilation happens in the first step and takes seconds per branch.

    Args:
        model: a network with reversible ops.
        **options: of ``torch.compile``; ``dynamic=False`` unless said otherwise.

    Returns:
        ``model``.

    Raises:
        ValueError: for a model without branches.

    Example:
        >>> from revnets.reversible import AdditiveCoupling, RevSequential
        >>> net = RevSequential([AdditiveCoupling(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))])
        >>> compile_branches(net, backend="eager")(torch.ones(1, 4, 2, 2))[0].shape
        torch.Size([1, 4, 2, 2])
    """
    found = branches(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no reversible op, so there is no branch to compile")
    # all branches of a class share the code that dynamo counts compilations of; by default it gives up after 8
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(found))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 16 * len(found))
    for branch in found:
        branch.compile(**{"dynamic": False, **options})
    return model


def branches(model: nn.Module) -> list[nn.Module]:
    """What the reversible ops of ``model`` call: their modules, but for other reversible ops."""
    found: dict[int, nn.Module] = {}
    for op in model.modules():
        stack = list(op.children()) if isinstance(op, ReversibleOp) else []
        lent = vars(op).get("lent")
        if lent is not None:
            found[id(lent.module)] = lent.module
        while stack:
            child = stack.pop()
            if isinstance(child, nn.ModuleDict | nn.ModuleList):
                stack.extend(child.children())
            elif not isinstance(child, ReversibleOp):
                found[id(child)] = child
    return list(found.values())
