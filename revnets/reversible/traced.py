"""What ``torch.fx`` sees of the engine: in evaluation plain module code, in training a chain as one node.

A traced chain stays what it is: it rebuilds activations, and its gradients are those of ``store``. Ops that look at
shapes or keep side information are one node in any mode, and so are retrofitted stages in training.
"""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import nn


def is_traced(*xs: Any) -> bool:
    """Whether these stand for tensors in ``torch.fx``'s symbolic tracing, so that nothing may depend on them."""
    return any(isinstance(x, torch.fx.Proxy) for x in xs)


def as_one_node(module: nn.Module, count: int, *xs: Any) -> tuple[Any, ...]:
    """The call of a module as one node of the graph that is being traced, and its results one by one.

    Args:
        module: inside of the traced one.
        count: of its results.
        xs: what it is called with.
    """
    result = as_leaf(module, *xs)
    return tuple(result[k] for k in range(count))


def as_leaf(module: nn.Module, *xs: Any) -> Any:
    """The call of a module as one node of the graph that is being traced, and what it gives."""
    tracer = next(x.tracer for x in xs if is_traced(x))
    return tracer.create_proxy("call_module", tracer.path_of_module(module), xs, {})
